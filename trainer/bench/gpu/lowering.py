"""What torch.compile would run on an H200, found on a machine without a GPU.

A function is traced and partitioned on the CPU by dynamo and AOTAutograd; its forward and backward graphs are moved to fake tensors on
cuda:0; inductor schedules them and writes their Triton code as for an H200 (sm_90, see `pretended`); nothing runs. Each kernel then has its
bytes and its products counted (`Kernel`), and its code can be compiled by Triton to a cubin (`compile_kernel`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from trainer.bench.gpu.pretended import patched

_SOURCE = re.compile(r"async_compile\.triton\('(?P<name>[^']+)', '''(?P<text>.*?)'''", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """One launch. bytes: read and written in global memory; flops: of matrix products and convolutions, 2 per multiply-add, 0 for others;
    attention: (rows, queries, keys, head width, backward) of a fused attention, rows = images x heads; None for others."""

    name: str
    bytes: int
    flops: int
    attention: tuple[int, int, int, int, bool] | None = None


@dataclass(frozen=True)
class Lowered:
    """A graph as inductor would run it. code: Triton sources by name, each once; program: Python source whose `call` launches them."""

    backward: bool
    kernels: tuple[Kernel, ...]
    code: dict[str, str]
    program: str = ""


class _Stopped(Exception):
    """Inductor has scheduled a graph; nothing is loaded or run."""


def lower(
    function: Callable[..., Any], *arguments: Any, backward: bool = True, autocast: bool = True, code: bool = True
) -> list[Lowered]:
    """The graphs of `function(*arguments)` (CPU tensors), forward first; inside `pretended.h200()`.

    backward: with gradients, the backward graph too. autocast: in bf16, as on the device. code: with the Triton sources. Raises whatever
    inductor raises, and RuntimeError if the function breaks into more than one graph.
    """
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    found: list[Lowered] = []
    torch.compiler.reset()  # dynamo counts the graphs of a function's code, and refuses the ninth

    def stop(lowering: Any) -> None:
        texts, program = {}, ""
        if code:
            program = lowering.codegen()[0].value
            texts = {m["name"]: m["text"] for m in _SOURCE.finditer(program)}
        else:
            lowering.init_wrapper_code()
            lowering._update_scheduler()
        found.append(Lowered(bool(lowering.is_backward), tuple(_kernels(lowering.scheduler.nodes)), texts, program))
        raise _Stopped

    whole = compile_fx.compile_fx_inner

    def inner(graph: Any, inputs: Any, **settings: Any) -> Callable[..., Any]:
        try:
            whole(graph, _on_cuda(graph, inputs), **settings)
        except Exception as error:
            if not _is_stop(error):
                raise
        return _Never()

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=cast(Any, inner))

    compiled = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with patched(GraphLowering, "_compile_to_module", stop), precision, torch.set_grad_enabled(backward):
        try:
            compiled(*arguments)
        except Exception as error:
            if not _is_stop(error):
                raise
    return sorted(found, key=lambda graph: graph.backward)


def compile_kernel(name: str, source: str) -> None:
    """Compile Triton code of inductor to a cubin for sm_90, every configuration that inductor would try; inside
    `pretended.h200()`. Raises Triton's error."""
    from torch._inductor.codecache import PyCodeCache

    getattr(PyCodeCache.load(source), name).precompile(warm_cache_only=True)


class _Never:
    """Stands for a compiled graph that is not to be run."""

    _boxed_call = True

    def __call__(self, *arguments: Any) -> Any:
        raise _Stopped


def _is_stop(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _Stopped) or isinstance(getattr(error, "inner_exception", None), _Stopped):
            return True
        error = error.__cause__ or error.__context__
    return False


def _on_cuda(graph: Any, inputs: Any) -> list[Any]:
    """Move a graph to fake tensors on cuda:0, in place; its inputs there."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.node import map_aggregate
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode: Any = next(one.fake_mode for one in inputs if isinstance(one, FakeTensor))
    there = torch.device("cuda", 0)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            args, kwargs = (
                map_aggregate(given, lambda a: there if isinstance(a, torch.device) else a)
                for given in (node.args, node.kwargs)
            )
            node.args, node.kwargs = args, kwargs
    graph.recompile()
    with mode:
        moved = [
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=there) if isinstance(one, Tensor) else one
            for one in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return moved


def _kernels(nodes: Any) -> Iterator[Kernel]:
    from torch._inductor.scheduler import NopKernelSchedulerNode

    for node in nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        yield Kernel(_label(node), int(node.get_read_write_buffers_sizes()), int(node.estimate_flops() or 0), _attention(node))


def _label(node: Any) -> str:
    inner = getattr(node, "node", None)
    name = getattr(inner, "op_overload", None) or getattr(inner, "python_kernel_name", None)
    return str(name) if name else "triton"


def _attention(node: Any) -> tuple[int, int, int, int, bool] | None:
    label = _label(node)
    if "scaled_dot_product" not in label:
        return None
    backward = "backward" in label
    inputs = [one for one in node.node.inputs if len(one.get_size()) == 4]
    q, k = (inputs[1], inputs[2]) if backward else (inputs[0], inputs[1])
    images, heads, queries, width = (int(n) for n in q.get_size())
    return images * heads, queries, int(k.get_size()[2]), width, backward
