"""The description of a run: fields of its start line, and files with its environment and its plan. MLflow receives all of it."""

from __future__ import annotations

import os
import platform
import re
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from sparsity.network import SparseNetwork
from sparsity.types import DENSE
from trainer.config.credentials import without_queries
from trainer.config.run_config import Config
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.model.build import build_schedule, cost_of
from trainer.run import directory as run
from trainer.storage.disk import write_text
from trainer.storage.private_file import private

# Variables that affect computation or communication; others may hold secrets and are not recorded.
PREFIXES = ("OMP_", "MKL_", "NCCL_", "GLOO_", "DS_", "TORCH", "PYTORCH_", "CUDA_", "KMP_", "MALLOC_")
NAMED = ("LD_PRELOAD", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES")
SECRET = re.compile("TOKEN|SECRET|KEY|PASS|PW|CREDENTIAL", re.IGNORECASE)  # names that are left out all the same
MANY_CLASSES = 4096  # with more, the start line omits their names


def start_line(config: Config, engine: Engine, data: dict[str, Index], model: SparseNetwork) -> dict[str, Any]:
    """Settings, processes, devices, data and code of an attempt; `data`: the indexes by split."""
    return {
        "config": config.resolved(),
        "world": engine.world,
        "device": engine.device_name(),
        "compile_cache": engine.compile_cache,
        "launcher": run.launcher(),
        "pixels": sorted({index.packing for index in data.values()} - {""}),
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "data": {name: _described(index, getattr(config.data, name)) for name, index in data.items()},
        "classes": _class_names(data["validation"]),
        **run.facts(),
    }


def write(directory: Path, config: Config, model: SparseNetwork) -> None:
    """RUN/environment.txt and RUN/plan.md. Rank 0 only."""
    with open(directory / "environment.txt", "w", opener=private) as file:
        file.write(environment())
    write_text(directory / "plan.md", plan_table(config, model))


def environment() -> str:
    """Python, system, devices, environment variables, installed packages; no secrets, no host names."""
    cores, memory = os.cpu_count(), "unknown"
    with suppress(OSError, psutil.Error):  # /proc is not mounted
        memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    lines = [f"python {sys.version.split()[0]}", f"system {platform.system()} {platform.release()} {platform.machine()}"]
    lines += [f"cores {cores}", f"memory {memory}", f"threads {torch.get_num_threads()}"]
    lines += [f"cuda {torch.version.cuda or 'absent'}"]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        lines.append(f"device {number}: {about.name}, {about.total_memory / 2**30:.1f} GiB")
    kept = {k: v for k, v in os.environ.items() if (k.startswith(PREFIXES) or k in NAMED) and not SECRET.search(k)}
    lines += ["", "[environment]", *(f"{name}={without_queries(value)}" for name, value in sorted(kept.items()))]
    found = {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions() if d.metadata["Name"]}
    return "\n".join([*lines, "", "[packages]", *sorted(found, key=str.lower), ""])


def plan_table(config: Config, model: SparseNetwork) -> str:
    """The plateaus of the run as a Markdown table: epochs, keep ratios, tokens per block, multiply-adds."""
    dense = cost_of(model, DENSE)["multiply_adds"]
    lines = [
        "| epochs | keep ratio of tokens | keep ratio of connections | tokens per block | multiply-adds | of dense |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for stretch in build_schedule(config).stretches():
        about = cost_of(model, stretch.plan)
        tokens, cost = " ".join(map(str, about["tokens"])), about["multiply_adds"]
        kept = f"{stretch.plan.keep_tokens:.3f} | {stretch.plan.keep_connections:.3f}"
        lines.append(f"| {stretch.text} | {kept} | {tokens} | {cost:.4g} | {cost / dense:.3f} |")
    lines += ["", f"Examples: {config.examples.method}, {config.examples.settings.summary}."]
    if probe := config.examples.probe:
        cost = probe.probe_share * cost_of(model, probe.plan)["multiply_adds"]
        lines += [
            f"Probe: {probe.probe_share:g} of the kept examples after each epoch, at keep ratio {probe.probe_keep:g} of the tokens; "
            f"{cost:.4g} multiply-adds per kept example and epoch."
        ]
    if kept := config.weights.settings.summary:
        lines += [f"Weights: {config.weights.method} keeps {kept}. Training computes dense products."]
    lines += ["The keep ratio of tokens applies at each pruning block. Multiply-adds: forward pass of one image."]
    return "\n".join([*lines, ""])


def _described(index: Index, pattern: str) -> dict[str, Any]:
    return {"pattern": pattern, "fingerprint": index.fingerprint, "images": len(index), "classes": len(index.classes)}


def _class_names(index: Index) -> list[str]:
    """For the start line; empty above MANY_CLASSES."""
    names = [str(name) for name in index.classes]
    return names if len(names) <= MANY_CLASSES else []
