"""`python -m launch local`: every GPU of this machine, or some CPU processes where there is none."""

from __future__ import annotations

from launch.job import Command, Job, LaunchError, Node, launcher
from launch.machine import Machine

CPU_PROCESSES = 2  # the default without GPUs


def place(machine: Machine, processes: int | None, port: int) -> Node:
    """One process per GPU, or as many as asked for. Raises LaunchError for more processes than GPUs, or none."""
    if processes is not None and processes < 1:
        raise LaunchError(f"--processes {processes}: at least 1")
    if machine.gpus:
        if processes is not None and processes > machine.gpus:
            raise LaunchError(
                f"--processes {processes}: this machine has {machine.gpus} GPU(s), one process each; ask for at most "
                f"{machine.gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        return Node(processes or machine.gpus, True, port)
    processes = processes or CPU_PROCESSES
    threads = machine.threads or max(1, machine.cores // processes)
    return Node(processes, False, port, threads=threads)


def render(job: Job, node: Node, python: str) -> Command:
    """What starts the processes of this machine."""
    return launcher(job, node, python)
