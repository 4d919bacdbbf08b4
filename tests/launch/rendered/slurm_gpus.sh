#!/bin/bash
#SBATCH --job-name=a_b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=1-00:00:00
#SBATCH --account=vision
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --constraint=h200
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mem=0

module load cuda/13.0
source /env/bin/activate
export NCCL_DEBUG=WARN
run='runs/a b'
address_of() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }
address=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
port=$((20000 + SLURM_JOB_ID % 10000))
while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
export address port
newest() { cat "$run/checkpoints/latest" 2> /dev/null || true; }
lines() { if [ -e "$run/journal.jsonl" ]; then wc -l < "$run/journal.jsonl"; else echo 0; fi; }
began() { tail -n +$(($1 + 1)) "$run/journal.jsonl" 2> /dev/null | head -n 9 | grep -q '"kind":"start"'; }
known() { cat "$PWD/.newest-$SLURM_JOB_ID" 2> /dev/null || head -n 1 "$PWD/.ends-$SLURM_JOB_ID" 2> /dev/null || true; }
note() { if [ -n "$1" ]; then printf '%s\n' "$1" > "$PWD/.newest-$SLURM_JOB_ID" || true; fi; }
watched() { while sleep 5; do note "$(newest)"; done; }
gone() {
  if [ -z "$(known)" ] || [ -n "$(newest)" ]; then return 1; fi
  echo "launch: $run: checkpoint $(known) is gone; waiting ${GONE:=600} s for it to come back"
  for _ in $(seq "$GONE"); do sleep 1; if [ -n "$(newest)" ]; then return 1; fi; done
  echo "launch: $run: an attempt would begin the run anew; not requeued. Bring the directory back, then submit the job again"
}
requeued() {
  local ends="$PWD/.ends-$SLURM_JOB_ID" at most=$2 count=1 what
  if [ "$1" -eq 0 ]; then rm -f "$ends" "$PWD/.newest-$SLURM_JOB_ID"; return; fi
  if gone; then return; fi
  at=$(newest)
  note "$at"
  if [ "$1" -eq 75 ]; then most=$3; fi
  if [ -e "$ends" ] && [ "$(head -n 1 "$ends")" = "$at" ]; then count=$(($(tail -n 1 "$ends") + 1)); fi
  printf '%s\n%s\n' "$at" "$count" > "$ends" || true
  what="launch: attempt $((${SLURM_RESTART_COUNT:-0} + 1)) ended with $1, newest checkpoint: ${at:-none}, $count of $most ends there"
  if [ "$1" -eq 2 ] && ! began "$from"; then what="$what, refused"; most=0; fi
  if [ "$1" -eq 73 ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then what="$what, another process trains this run"; most=0; fi
  if [ "$count" -lt "$most" ]; then echo "$what; requeued"; scontrol requeue "$SLURM_JOB_ID"; return; fi
  rm -f "$ends" "$PWD/.newest-$SLURM_JOB_ID"
  echo "$what; not requeued. Logs: $run/logs. After a repair submit the job again, by the same command with --resume"
}
if gone; then exit 1; fi
from=$(lines)
watched > /dev/null 2>&1 & watcher=$!
export stopped="$PWD/.stopped-$SLURM_JOB_ID"
rm -f "$stopped"
code=0
srun --kill-on-bad-exit=1 --wait=600 --cpus-per-task=96 bash -c 'trap : INT TERM HUP USR1 USR2; /env/bin/python -m launch node configs/quickstart.yaml optim.lr=1e-3 '"'"'name=a b'"'"' --resume --processes 8 --nodes 4 --number "$SLURM_NODEID" --address "$address" --port "$port"; code=$?; [ "$code" -ne 75 ] || : > "$stopped"; exit "$code"' || code=$?
kill "$watcher" 2> /dev/null || true
if [ -e "$stopped" ]; then code=75; rm -f "$stopped"; fi
requeued "$code" 3 3
exit "$code"
