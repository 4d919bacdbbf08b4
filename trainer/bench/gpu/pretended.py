"""An H200 that is not there, for inductor and Triton: enough of a device to compile for it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
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
            patches.enter_context(patched(cuda, name, staticmethod(value)))
        patches.enter_context(patched(cuda.Worker, "get_device_properties", staticmethod(lambda device=None: H200)))
        patches.enter_context(patched(cuda.Worker, "current_device", staticmethod(lambda: 0)))
        for name, value in {
            "get_device_properties": lambda device=None: H200,
            "get_device_capability": lambda device=None: CAPABILITY,
            "is_bf16_supported": lambda *a, **k: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "is_available": lambda: (
                False
            ),  # else dynamo keeps the state of its generator, where the environment makes torch count devices
        }.items():
            patches.enter_context(patched(torch.cuda, name, value))
        patches.enter_context(patched(triton_helpers, "set_driver_to_gpu", lambda: None))
        patches.enter_context(patched(torch.nn.functional, "scaled_dot_product_attention", _attention_of_cuda))
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


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block."""
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
