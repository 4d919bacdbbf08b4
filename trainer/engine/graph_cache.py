"""Lets torch keep whole compiled graphs of our networks, not their kernels alone."""

from __future__ import annotations

import hashlib
import inspect

import torch

TORCHS = (
    "torch.nn.attention._sdpa_kernel",
    "torch.nn.attention._backend_from_string",
)  # in graphs with a chosen attention kernel


def cache_whole_graphs(attention_backend: str = "torch") -> None:
    """torch's cache of traced graphs (forward, backward, partition) leaves out every graph with a function that it does not know: those
    that choose an attention kernel or gather tokens, which a restart would differentiate and partition again. What these functions compute
    is in the graph's key: torch's by their arguments and torch's version, ours by its source.

    attention_backend: in force around the graphs that are compiled from now on (`engine.attention`), which torch's key leaves out: a graph
    compiled for another one would be loaded and run."""
    import torch._inductor.config as inductor

    from sparsity import attention

    ours = hashlib.sha256(inspect.getsource(attention).encode()).hexdigest()
    known = dict.fromkeys(TORCHS, torch.__version__) | {"sparsity.attention._gathered_in_graph": ours}
    known |= {"engine.attention": attention_backend}  # no function: a part of every key
    inductor.unsafe_marked_cacheable_functions = {**inductor.unsafe_marked_cacheable_functions, **known}
