"""Weights and optimizer state, unsharded and by parameter name, from DeepSpeed's flat partitions and back: any ZeRO stage and world size.

DeepSpeed's own checkpoints are tied to the world size and need a conversion ("universal checkpoint") and pickle. Its
`safe_get_full_*` accessors give every tensor by parameter, so that a checkpoint can be elastic by construction: measured
bitwise on the same world, and to rounding on another (tests/engine/test_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.engine.errors import EngineError
from trainer.engine.optimizer_numbers import COUNTS, ON_HOST, decoded, encoded, is_number, numbers_of
from trainer.engine.partition import drop_gathered, gathered, is_pieces
from trainer.storage.host_copies import HostCopies

GROUP = "group."  # begin of the keys of numbers in the parameter groups
Change = Callable[[str, Tensor, int], Tensor]
"""name of a parameter, some of its elements (flat), index of the first one in the flattened parameter -> their new values."""


class FullState:
    """Full state of a prepared model and its optimizer. Reading is collective; rank 0 gets everything, on the CPU, the others {}."""

    def __init__(self, module: nn.Module, optimizer: Any, rank: int, world: int, device: torch.device):
        self.module, self.optimizer = module, optimizer
        self.rank, self.world, self.device = rank, world, device

    def weights(self, copies: HostCopies | None = None) -> dict[str, Tensor]:
        """Every parameter (float32) and buffer, unsharded; collective. copies: memory for them, default new memory."""
        copies, state = copies or HostCopies(), {}
        saved = self.module.state_dict().keys()  # without non-persistent buffers
        for name, value in self.module.named_buffers():
            if name in saved and self.rank == 0:
                state[name] = copies(name, value)
        for name, parameter in self.module.named_parameters():
            whole = self._whole(parameter)
            if self.rank == 0:  # one copy per run, not one per rank of a node
                state[name] = copies(name, whole, torch.float32)
        copies.wait()
        return state

    def optimizer_state(self, copies: HostCopies | None = None) -> dict[str, Tensor]:
        """The optimizer's state by parameter, unsharded and independent of the world size: {"name|key": tensor}; collective.

        DeepSpeed keeps it in flat partitions per rank. Naming it by parameter instead makes a checkpoint elastic (any world
        size, any ZeRO stage) without a conversion, and readable without pickle. Numbers (step counts) are "|key", see `numbers_of`.
        """
        self._link()
        base = self._base_optimizer()
        first = base.state.get(self._holders()[0], {})
        trained = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        # whole parameters may differ in what they keep
        own = {name: base.state[p] for name, p in trained.items() if not is_pieces(p) and base.state.get(p)}
        copies, group = copies or HostCopies(), base.param_groups[0]
        state = numbers_of(own, first)
        state |= dict(encoded(f"|{GROUP}{key}", group[key]) for key in COUNTS if key in group)
        for name, parameter in trained.items():
            holder = first if is_pieces(parameter) else own.get(name, {})
            for key in sorted(key for key, value in holder.items() if not is_number(value)):
                whole = self._whole(parameter, key)
                if self.rank == 0:
                    state[f"{name}|{key}"] = copies(f"{name}|{key}", whole)
        copies.wait()
        return state if self.rank == 0 else {}

    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Load the output of `weights` and `optimizer_state`, for any world size. Raises EngineError for a missing weight."""
        states: dict[str, dict[str, Any]] = {}  # "" : the numbers that parameters share
        for full, value in optimizer.items():
            name, _, key = full.partition("|")
            key, found = decoded(key, value)
            states.setdefault(name, {})[key] = found
        shared = states.pop("", {})
        for key in COUNTS:
            if (count := shared.pop(f"{GROUP}{key}", None)) is not None:
                for group in self._base_optimizer().param_groups:
                    group[key] = count.clone() if isinstance(count, Tensor) else count
        self._make_state(shared, states)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
            for name, parameter in self.module.named_parameters():
                if name not in weights:
                    raise EngineError(f"checkpoint has no weight {name!r}: it belongs to another model; check model.*")
                self._put(parameter, weights[name].to(self.device))
                for key, value in states.get(name, {}).items() if is_pieces(parameter) else ():
                    if not is_number(value) or parameter.ndim == 0:
                        self._put(parameter, value.to(self.device), key)

    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by name, float32, unsharded, on the device of every rank; collective. Not to be changed in place."""
        found = dict(self.module.named_parameters())
        return {name: self._whole(found[name]).detach().float() for name in names}

    @torch.no_grad()
    def change(self, names: Iterable[str], change: Change, moments: bool = False) -> None:
        """New values for parameters, or for the optimizer's moments of them, each rank for the elements that it has; no communication.
        `change` must give an element the same value whatever else is in its part. Parameters are in float32, or set to 0."""
        if moments:
            self._link()
        found = dict(self.module.named_parameters())
        for name in names:
            for key in self._moments_of(found[name]) if moments else [None]:
                self._change(name, found[name], change, key)
        if not moments:
            drop_gathered([found[name] for name in names if hasattr(found[name], "ds_id")])

    def _moments_of(self, parameter: Any) -> list[str]:
        """The names of the optimizer's state that has the shape of the parameter; [] before its first step."""
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            return sorted(mapping.optim_fragment or {})
        if is_pieces(parameter) and not hasattr(parameter, "ds_id"):
            return []  # ZeRO 1, 2: no element of it is on this rank
        base = self._base_optimizer()
        holder = base.state.get(self._holders()[0] if hasattr(parameter, "ds_id") else parameter, {})
        same = hasattr(parameter, "ds_id")  # of flat partitions
        return sorted(key for key, value in holder.items() if not is_number(value) and (same or value.shape == parameter.shape))

    def _change(self, name: str, parameter: Any, change: Change, key: str | None) -> None:
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import (
                safe_get_local_fp32_param,
                safe_get_local_optimizer_state,
                safe_set_local_fp32_param,
                safe_set_local_optimizer_state,
            )

            found = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
            assert found is not None
            begin = len(found) * self.rank
            num, part = max(0, min(len(found), parameter.ds_numel - begin)), found.clone()  # the rest is padding
            part[:num] = change(name, part[:num], begin)
            if key is None:
                safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
            return
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            part = mapping.get_hp_fragment(optim_state_key=key)
            part.copy_(change(name, part, mapping.lp_fragment_address.start))
        if key is None:
            flat = parameter.data.view(-1)
            flat.copy_(change(name, flat, 0))
        elif mapping is None:
            flat = self._base_optimizer().state[parameter][key].view(-1)
            flat.copy_(change(name, flat, 0))

    def _base_optimizer(self) -> torch.optim.Optimizer:
        inner = self.optimizer
        while (
            below := getattr(inner, "optimizer", None) or getattr(inner, "_base_optimizer", None)
        ) is not None:  # of Lookahead
            inner = below
        return inner

    def _holders(self) -> list[Tensor]:
        """The tensors that the base optimizer updates: flat partitions under ZeRO, parameters otherwise."""
        flat = getattr(
            self.optimizer, "fp32_partitioned_groups_flat", None
        )  # ZeRO 3 keeps them out of the groups between steps
        return flat or [p for group in self._base_optimizer().param_groups for p in group["params"]]

    def _make_state(self, shared: dict[str, Any], states: dict[str, dict[str, Any]]) -> None:
        """Create the optimizer's state before its first step: of whole parameters as it was, of flat partitions to be filled."""
        base, keys = self._base_optimizer(), {key for state in states.values() for key in state}
        # a step count lives where the optimizer's kernels look for it: on the device only if fused or capturable
        on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)

        def placed(key: str, value: Any, holder: Tensor) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.clone().to("cpu" if value.ndim == 0 and key in ON_HOST and not on_device else holder.device)

        names = {id(p): name for name, p in self.module.named_parameters() if not is_pieces(p)}
        everywhere = {key: value for key, value in shared.items() if key not in keys}
        for holder in self._holders():
            if id(holder) in names:
                own = states.get(names[id(holder)], {})
                found = everywhere | own if own or not states else {}  # else: it has had no gradient yet
            else:
                found = {key: torch.zeros_like(holder) for key in keys - shared.keys()} | shared
            base.state[holder].update({key: placed(key, value, holder) for key, value in found.items()})
        self._link()

    def _link(self) -> None:
        """Link the state of every parameter. DeepSpeed's own linking (ZeRO 1, 2) runs once, in the first group's first step, when the
        other groups have no state yet (observed in 0.19.8)."""
        if hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """A parameter in float32, or its optimizer state `key`, unsharded; collective."""
        if hasattr(parameter, "ds_id") and not parameter.requires_grad:  # frozen: DeepSpeed's optimizer does not have it
            return gathered(parameter, parameter.ds_tensor)  # pyright: ignore[reportAttributeAccessIssue]
        if is_pieces(parameter):
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            found = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
            assert found is not None
            return found
        return parameter if key is None else self._base_optimizer().state[parameter][key]

    def _put(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """The reverse of `_whole`; every rank takes its own partition."""
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

            piece: Tensor = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
            size = piece.numel()  # pieces are padded to equal length
            padded = value.new_zeros(size * self.world)
            padded[: value.numel()] = value.flatten()
            mine = padded.narrow(0, size * self.rank, size)
            if key is None:
                safe_set_local_fp32_param(parameter, mine)
                piece.data.copy_(mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
        elif is_pieces(parameter):
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if key is None:
                safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        else:
            parameter.data.copy_(value)  # its state was made with its values, see `_make_state`
