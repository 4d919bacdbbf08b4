"""Code of a run on a CUDA device that does not exist: fake tensors, and a mode that refuses what makes the host wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


PAGEABLE = 64 << 10  # bytes; CUDA copies more of them than that from pageable memory piece by piece, and the host waits
_pinned: dict[int, Any] = {}  # storages of pinned memory, by address


class Waits(AssertionError):
    """The host would wait for the device."""


class NoWaits(TorchDispatchMode):
    """Raises Waits for a number read by the host, an indexing by a mask, and a blocking copy. Counts copies, operations on the device, and
    those of them that are kernels (no view) outside of `one_kernel`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.copies = 0
        self.kernels: list[str] = []
        self.graphs: list[str] = []
        self.inside = 0

    def one_kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a compiled graph: its operations are checked, but not counted among the kernels; `name` is, once."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.graphs.append(name)
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1

        return called

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = [one for one in given if one.device.type == "cuda"]
        if there and operation in READS:
            raise Waits(f"{operation} of a tensor on the device")
        indexes = args[1] if operation in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) else ()
        if any(one.dtype == torch.bool for one in indexes if one is not None and one.device.type == "cuda"):
            raise Waits(f"{operation} by a mask: the size of its result is read")
        blocking = not kwargs.get("non_blocking", len(args) > 2 and args[2] is True)
        found = operation(*args, **kwargs)
        if operation.is_view and given and _is_pinned(given[0]):  # a fake view of a real tensor has a storage of its own
            _pin(found)
        if operation in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if operation is aten.copy_.default else args[0]
            if source.device.type != found.device.type:
                if blocking or not _staged_at_once(operation, source, found):
                    raise Waits(f"{operation} from {source.device} to {found.device}, shape {tuple(source.shape)}, waits")
                self.copies += 1
        on_device = bool(there) or (isinstance(found, Tensor) and found.device.type == "cuda")
        if on_device and not self.inside and operation.namespace == "aten" and not operation.is_view:
            self.kernels.append(str(operation))
        self.operations += on_device
        return found


def _pin(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    _pinned[storage._cdata] = storage
    return tensor


def _is_pinned(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in _pinned


def _staged_at_once(operation: Any, source: Tensor, found: Tensor) -> bool:
    """Whether a non-blocking copy returns before it is made: the host's side is pinned (torch pins the result of `to`), or small."""
    if found.device.type == "cpu" and operation is aten._to_copy.default:
        return True
    host = source if source.device.type == "cpu" else found
    to_device = host is source
    return _is_pinned(host) or (to_device and host.nbytes <= PAGEABLE)


@contextlib.contextmanager
def fake_cuda(monkeypatch: Any) -> Iterator[None]:
    """Tensors on cuda:0 may be made inside the block, whose numbers are not known; pinned memory, streams and events are pretended."""

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None:
            raise Waits("an event is waited for")

    class Stream:
        def __init__(self, device: Any = None) -> None: ...
        def wait_stream(self, other: Any) -> None: ...

    empty = torch.empty
    monkeypatch.setattr(
        "torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True
    )  # it knows tensors by their exact type
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)  # or autocast is switched off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *_: _pin(tensor.clone()))
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *args, pin_memory=False, **kwargs: _pin(empty(*args, **kwargs)) if pin_memory else empty(*args, **kwargs),
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    _pinned.clear()


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the fake device, in place."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                one._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return module
