#!/bin/bash
#SBATCH --job-name=a_b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=4
#SBATCH --time=60
#SBATCH --signal=USR1@300
#SBATCH --requeue

address_of() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }
address=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
port=$((20000 + SLURM_JOB_ID % 10000))
export address port
export stopped="$PWD/.stopped-$SLURM_JOB_ID"
rm -f "$stopped"
code=0
srun --kill-on-bad-exit=1 bash -c 'trap : INT TERM HUP USR1 USR2; apptainer exec --nv --bind "$PWD" --pwd "$PWD" '"'"'/images/tri level.sif'"'"' /env/bin/python -m launch node configs/quickstart.yaml optim.lr=1e-3 '"'"'name=a b'"'"' --resume --processes 4 --nodes 1 --number "$SLURM_NODEID" --address "$address" --port "$port"; code=$?; [ "$code" -ne 75 ] || : > "$stopped"; exit "$code"' || code=$?
if [ "$code" -eq 75 ] || [ -e "$stopped" ]; then code=75; rm -f "$stopped"; scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
