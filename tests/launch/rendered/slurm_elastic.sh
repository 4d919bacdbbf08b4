#!/bin/bash
#SBATCH --job-name=a_b
#SBATCH --nodes=2-8
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --no-kill

address_of() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }
address=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
port=$((20000 + SLURM_JOB_ID % 10000))
export address port
addresses=$(for name in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do address_of "$name"; done)
export addresses
export stopped="$PWD/.stopped-$SLURM_JOB_ID"
rm -f "$stopped"
code=0
srun --no-kill --kill-on-bad-exit=0 --ntasks-per-node=1 bash -c 'trap : INT TERM HUP USR1 USR2; /env/bin/python -m launch node configs/quickstart.yaml optim.lr=1e-3 '"'"'name=a b'"'"' --resume --processes 8 --nodes "2:$SLURM_NNODES" --number "$SLURM_NODEID" --address "$address" --port "$port" --here "$(echo $addresses | cut -d " " -f $((SLURM_NODEID + 1)))"; code=$?; [ "$code" -ne 75 ] || : > "$stopped"; [ "$code" -eq 0 ] || timeout 20 bash -c ": < /dev/tcp/$SLURM_LAUNCH_NODE_IPADDR/$SLURM_SRUN_COMM_PORT" || scontrol requeue "$SLURM_JOB_ID"; exit "$code"' || code=$?
if [ "$code" -eq 75 ] || [ -e "$stopped" ]; then code=75; rm -f "$stopped"; scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
