"""What torch.compile would run on an H200, found on a machine without a GPU.

A function is traced and partitioned on the CPU by dynamo and AOTAutograd; its forward and backward graphs are moved to fake tensors on
cuda:0; inductor schedules them and writes their Triton code as for an H200 (sm_90); nothing runs. Each kernel then has its bytes and its
products counted (`Kernel`), and its code can be compiled by Triton to a cubin (`compile_kernel`).
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    L2_cache_size=60 << 20,
    gcnArchName="",
)
CAPABILITY, SM = (9, 0), 90
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


class _Driver:
    """The part of Triton's driver that compiling needs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", SM, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return CAPABILITY

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def h200() -> Iterator[None]:
    """Inside the block inductor and Triton believe in an H200 as cuda:0, and SDPA is what CUDA chooses for bf16: flash attention, or with a
    mask the memory-efficient kernel. Afterwards everything is as before; compiled functions of the block are forgotten."""
    import torch._dynamo.device_interface as interface
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import driver

    cuda: Any = interface.CudaInterface
    facts: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda device=None: H200,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "get_compute_capability": lambda device=None: SM,
        "raise_if_triton_unavailable": lambda device=None: None,
        "is_triton_capable": lambda device=None: True,
        "is_bf16_supported": lambda *a, **k: True,
        "synchronize": lambda device=None: None,
    }
    with contextlib.ExitStack() as patches:
        for name, value in facts.items():
            patches.enter_context(_patched(cuda, name, staticmethod(value)))
        patches.enter_context(_patched(cuda.Worker, "get_device_properties", staticmethod(lambda device=None: H200)))
        patches.enter_context(_patched(cuda.Worker, "current_device", staticmethod(lambda: 0)))
        for name, value in {
            "get_device_properties": lambda device=None: H200,
            "get_device_capability": lambda device=None: CAPABILITY,
            "is_bf16_supported": lambda *a, **k: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
        }.items():
            patches.enter_context(_patched(torch.cuda, name, value))
        patches.enter_context(_patched(triton_helpers, "set_driver_to_gpu", lambda: None))
        patches.enter_context(_patched(torch.nn.functional, "scaled_dot_product_attention", _attention_of_cuda))
        patches.enter_context(inductor.patch(shape_padding=False, fx_graph_cache=False, compile_threads=1))
        patches.enter_context(functorch.patch(force_non_lazy_backward_lowering=True))
        before = driver._active
        driver.set_active(cast(Any, _Driver()))
        _forget_triton()
        torch.compiler.reset()
        try:
            yield
        finally:
            driver._active = before
            _forget_triton()
            torch.compiler.reset()


def _forget_triton() -> None:
    """Of torch's answers to "is there a device for Triton?", which it keeps for the life of the process: one that compiled for a CPU before
    would be refused here, one that was here would compile for a GPU afterwards."""
    from torch.utils import _triton

    for answer in vars(_triton).values():
        if hasattr(answer, "cache_clear"):
            answer.cache_clear()


def lower(
    function: Callable[..., Any], *arguments: Any, backward: bool = True, autocast: bool = True, code: bool = True
) -> list[Lowered]:
    """The graphs of `function(*arguments)` (CPU tensors), forward first; inside `h200()`.

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
    with _patched(GraphLowering, "_compile_to_module", stop), precision, torch.set_grad_enabled(backward):
        try:
            compiled(*arguments)
        except Exception as error:
            if not _is_stop(error):
                raise
    return sorted(found, key=lambda graph: graph.backward)


def compile_kernel(name: str, source: str) -> None:
    """Compile Triton code of inductor to a cubin for sm_90, every configuration that inductor would try; inside `h200()`. Raises Triton's
    error."""
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


def _attention_of_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **more: Any
) -> Tensor:
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, False, return_debug_mask=False)[0]
    mask = attn_mask
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, float("-inf"))
        mask = mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, False)[0]


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


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = owner.__dict__.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
