#!/bin/bash
#SBATCH --job-name=a_b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --no-requeue

address_of() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }
address=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
port=$((20000 + SLURM_JOB_ID % 10000))
while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
export address port
code=0
srun --kill-on-bad-exit=1 --wait=600 bash -c '/env/bin/python -m launch node configs/quickstart.yaml optim.lr=1e-3 '"'"'name=a b'"'"' --processes 2 --nodes 2 --number "$SLURM_NODEID" --address "$address" --port "$port"' || code=$?
exit "$code"
