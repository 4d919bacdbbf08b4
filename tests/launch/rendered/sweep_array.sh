#!/bin/bash
#SBATCH --job-name=grid
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --array=0-3%2
#SBATCH --output=slurm-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=8
#SBATCH --time=60
#SBATCH --signal=USR1@300
#SBATCH --requeue

case "$SLURM_ARRAY_TASK_ID" in
  0) set -- configs/a.yaml 'tokens.blocks=[1, 2]' name=grid-a-blocks_1_2_-seed0 seed=0 tracking.parent=grid --resume ;;
  1) set -- configs/a.yaml 'tokens.blocks=[1, 2]' name=grid-a-blocks_1_2_-seed1 seed=1 tracking.parent=grid --resume ;;
  2) set -- configs/a.yaml 'tokens.blocks=[3]' name=grid-a-blocks_3_-seed0 seed=0 tracking.parent=grid --resume ;;
  3) set -- configs/a.yaml 'tokens.blocks=[3]' name=grid-a-blocks_3_-seed1 seed=1 tracking.parent=grid --resume ;;
esac
address_of() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }
address=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
port=$((20000 + SLURM_JOB_ID % 10000))
export address port
export stopped="$PWD/.stopped-$SLURM_JOB_ID"
rm -f "$stopped"
code=0
srun --kill-on-bad-exit=1 bash -c 'trap : INT TERM HUP USR1 USR2; /env/bin/python -m launch node "$@" --processes 8 --nodes 2 --number "$SLURM_NODEID" --address "$address" --port "$port"; code=$?; [ "$code" -ne 75 ] || : > "$stopped"; exit "$code"' launch "$@" || code=$?
if [ "$code" -eq 75 ] || [ -e "$stopped" ]; then code=75; rm -f "$stopped"; scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
