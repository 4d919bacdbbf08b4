"""`python -m launch slurm`: a batch script with one `launch node` per node; the first node of the job's list is the rendezvous.

Slurm's signal before the limit reaches the ranks, which save and end with 75; the script then requeues the job, and `--resume`
continues from the checkpoint (or starts, where there is none).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from launch.job import LOGS, STOPPED, Job, LaunchError, Nodes, name_of, node_words, safe_name
from launch.nodes import LEFT
from launch.restarts import RESTARTS

# by Slurm's own address: a node's name may resolve nowhere
ADDRESS_OF = (
    r"""address_of() { scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }"""
)
# The script runs on the node of the rendezvous. With a port in use there, accelerate ended all attempts at once, before the first step.
PORT_IN_USE = 'while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done'
# An elastic job outlives its nodes, but not its script, which runs on the first one: Slurm (22.05) would leave the others allocated and
# idle until the limit. So a node that ends while srun is gone requeues the job.
SURVIVOR = (
    '{}; [ "$code" -eq 0 ]'
    ' || timeout 20 bash -c ": < /dev/tcp/$SLURM_LAUNCH_NODE_IPADDR/$SLURM_SRUN_COMM_PORT"'
    ' || scontrol requeue "$SLURM_JOB_ID"'
)
# srun's code alone does not say that the job was stopped: the node of rank 0 ends with 75, srun then ends a slower node with 143, and
# returns the highest. So a node leaves a file, in the folder that containers see too. Slurm signals this shell as well: trap.
NOTED = 'trap : INT TERM HUP USR1 USR2; {}; code=$?; [ "$code" -ne ' + str(STOPPED) + ' ] || : > "$stopped"'
# Requeued as long as the newest checkpoint changes between two ends: $2 ends at one checkpoint are the most, $3 for a job that was
# stopped. Counted in a file, because the script starts anew; Slurm's own counter knows no checkpoints. Where checkpoints were and are gone
# (directory renamed, file system not mounted), `--resume` would begin the run anew: the last one is read every 5 s during the attempt, and
# nothing starts without it. Codes: 2 before the first line in the journal is a wrong setting; 73 another process that trains this run.
REQUEUED = r"""newest() { cat "$run/checkpoints/latest" 2> /dev/null || true; }
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
}"""
HERE = '"$(echo $addresses | cut -d " " -f $((SLURM_NODEID + 1)))"'
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
EARLY = 60  # seconds by which Slurm's signal may come before its time


@dataclass(frozen=True)
class SlurmRequest:
    """Slurm options of a job. processes: per node. gpus: per node, 0 for a CPU job. signal: seconds before the limit."""

    nodes: Nodes
    processes: int
    gpus: int = 0
    cpus: int | None = None  # per process
    time: str | None = None
    signal: int = 300
    requeue: bool = True
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    output: str | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # lines of shell before anything else
    extra: tuple[str, ...] = ()  # verbatim #SBATCH options
    container: str | None = None
    runtime: str = "apptainer"
    logs: str = LOGS
    restarts: int = RESTARTS  # ends with the same newest checkpoint after which the job is not requeued

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise LaunchError(f"--restarts {self.restarts}: must be >= 0; 0 never requeues a failed job")
        if self.gpus < 0:
            raise LaunchError(f"--gpus {self.gpus}: per node, 0 or more")
        if self.processes < 1:
            raise LaunchError(f"--processes {self.processes}: at least 1")
        if self.cpus is not None and self.cpus < 1:
            raise LaunchError(f"--cpus {self.cpus}: at least 1 core per process")
        if self.nodes.elastic and not self.requeue:
            raise LaunchError(
                f"--nodes {self.nodes} with --no-requeue: an elastic job must be able to requeue; remove --no-requeue"
            )
        if self.gpus and self.gpus != self.processes:
            raise LaunchError(f"--gpus {self.gpus} with --processes {self.processes}: one process per GPU; remove --processes")
        if self.time is not None and not TIME.fullmatch(self.time):
            raise LaunchError(f"--time {self.time}: Slurm reads minutes, H:M:S or D-H:M:S, e.g. 1-00:00:00")
        if self.signal < 1:
            raise LaunchError(f"--signal {self.signal}: seconds before the limit, at least 1")
        if self.time is not None and 0 < (limit := _seconds(self.time)) <= self.signal + EARLY:
            raise LaunchError(
                f"--time {self.time} with --signal {self.signal}: Slurm sends the signal up to {EARLY} s early, so a job of {limit} s "
                "would save and end as soon as it starts; give more time, or a smaller --signal"
            )
        for name in ("account", "partition", "qos", "constraint", "output"):
            if "\n" in (value := getattr(self, name) or "") or (name != "output" and re.search(r"[\s'\"]", value)):
                raise LaunchError(f"--{name} {value!r}: no blanks or quotes allowed")
        if self.runtime not in ("apptainer", "pyxis"):
            raise LaunchError(f"--runtime {self.runtime}: unknown; valid: apptainer, pyxis")
        for line in self.extra:
            if not line.startswith("-") or "\n" in line:
                raise LaunchError(f"--sbatch {line!r}: must be one option that begins with a dash, e.g. --exclusive")


def render(job: Job, request: SlurmRequest, python: str, run: str) -> str:
    """The text of the batch script. run: directory of the run, whose checkpoints decide whether a failed job is requeued."""
    resumed = replace(job, resume=True) if request.requeue else job
    head = _head(request, name_of(job), request.output or "slurm-%j.txt")
    return "\n".join(
        [
            *head,
            *([f"run={shlex.quote(run)}"] if request.requeue else []),
            *_rendezvous(request),
            *_srun(request, python, resumed),
            "",
        ]
    )


def render_array(
    jobs: list[Job], request: SlurmRequest, python: str, name: str, runs: list[str], at_once: int | None = None
) -> str:
    """The text of a batch script that is an array, one task per job; at most `at_once` of them run together. runs: directory of each."""
    if at_once is not None and at_once < 1:
        raise LaunchError(f"--at-once {at_once}: at least 1")
    limit = f"%{at_once}" if at_once else ""
    head = _head(request, safe_name(name), request.output or "slurm-%A_%a.txt", f"--array=0-{len(jobs) - 1}{limit}")
    cases = [
        f"  {number}) run={shlex.quote(run)}; set -- {shlex.join(job.words())} ;;"
        for number, (job, run) in enumerate(zip(jobs, runs, strict=True))
    ]
    table = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    return "\n".join([*head, *table, *_rendezvous(request), *_srun(request, python, None), ""])


def _head(r: SlurmRequest, name: str, output: str, *more: str) -> list[str]:
    """Options, modules and the user's own lines."""
    options = [f"--job-name={name}", f"--nodes={str(r.nodes).replace(':', '-')}"]
    options += [
        *([] if r.nodes.elastic else ["--ntasks-per-node=1"]),
        *more,
    ]  # with a number of tasks Slurm grants the fewest nodes
    options += [f"--output={_quoted(output)}", "--open-mode=append"]
    options += [f"--gpus-per-node={r.gpus}"] if r.gpus else []
    options += [f"--cpus-per-task={r.cpus * r.processes}"] if r.cpus else []
    options += [
        f"--{name}={value}" for name in ("time", "account", "partition", "qos", "constraint") if (value := getattr(r, name))
    ]
    options += [f"--signal=USR1@{r.signal}"] if r.time else []
    options += ["--requeue"] if r.requeue else ["--no-requeue"]
    options += ["--no-kill"] if r.nodes.elastic else []  # a lost node is not the end of the job
    options += r.extra
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    return [*lines, *(f"module load {shlex.quote(name)}" for name in r.modules), *r.setup]


def _rendezvous(r: SlurmRequest) -> list[str]:
    """Address and port of the rendezvous: the first node of the job's list."""
    lines = [ADDRESS_OF, 'address=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")']
    lines += ["port=$((20000 + SLURM_JOB_ID % 10000))", PORT_IN_USE, "export address port"]
    if r.nodes.elastic:
        lines += ['addresses=$(for name in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do address_of "$name"; done)']
        lines += ["export addresses"]
    return lines


def _srun(r: SlurmRequest, python: str, job: Job | None) -> list[str]:
    """One `launch node` per node; requeued where it was stopped. job None: the script's own arguments."""
    # of MIN-MAX nodes Slurm grants a number, which does not grow later
    nodes, here = (f'"{r.nodes.least}:$SLURM_NNODES"', HERE) if r.nodes.elastic else (str(r.nodes), "")
    numbered = node_words(job or '"$@"', r.processes, nodes, '"$SLURM_NODEID"', '"$address"', '"$port"', python, here, r.logs)
    inner, container = " ".join(numbered), []
    if r.container and r.runtime == "pyxis":
        container = [
            f"--container-image={shlex.quote(r.container)}",
            '--container-mounts="$PWD:$PWD"',
            '--container-workdir="$PWD"',
        ]
    elif r.container:
        inner = f'apptainer exec {"--nv " if r.gpus else ""}--bind "$PWD" --pwd "$PWD" {shlex.quote(r.container)} {inner}'
    if r.requeue:
        inner = NOTED.format(inner)
        inner = f'{SURVIVOR.format(inner) if r.nodes.elastic else inner}; exit "$code"'
    cpus = [f"--cpus-per-task={r.cpus * r.processes}"] if r.cpus else []  # srun no longer takes it from the job
    together = (
        "--no-kill --kill-on-bad-exit=0 --ntasks-per-node=1" if r.nodes.elastic else f"--kill-on-bad-exit=1 --wait={LEFT:g}"
    )
    words = [] if job else ["launch", '"$@"']
    lines = [" ".join(["srun", together, *cpus, *container, "bash", "-c", shlex.quote(inner), *words])]
    lines = ["code=0", f"{lines[0]} || code=$?"]  # `set -e` among the user's lines must not end this here
    if r.requeue:
        begin = [*REQUEUED.splitlines(), "if gone; then exit 1; fi", "from=$(lines)", "watched > /dev/null 2>&1 & watcher=$!"]
        lines = [*begin, 'export stopped="$PWD/.stopped-$SLURM_JOB_ID"', 'rm -f "$stopped"', *lines]
        lines += ['kill "$watcher" 2> /dev/null || true']
        lines += [f'if [ -e "$stopped" ]; then code={STOPPED}; rm -f "$stopped"; fi']
        lines += [f'requeued "$code" {r.restarts} {max(r.restarts, RESTARTS)}']
    return [*lines, 'exit "$code"']


def _quoted(value: str) -> str:
    """Quoted for an #SBATCH line; a percent sign is sbatch's."""
    return value if re.fullmatch(r"[^\s'\"#\\]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _seconds(time: str) -> int:
    """Slurm's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 means without limit."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not days:
        parts = [0, *parts] if len(parts) < 3 else parts  # without hours
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
