"""The rule `probe`: after an epoch, clean images of a keyed share of its examples pass the network without gradient.

A second reading of that share, and not a clean view beside each training image: all images are judged by the same weights in passes
of `evaluate.batch` images rather than a few rows per step, every rank makes the same number of them, and their whole time,
decoding included, is measured apart from the training steps. The raw weights are probed, not their average. Training is not
affected: train mode and random generators are restored, no gradient is computed.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
from torch import Tensor

from sparsity.types import Examples, Observation, Selection
from trainer.checkpoint.state import TrainState
from trainer.config.run_config import Config
from trainer.data.augment.on_device import normalise
from trainer.data.loader.probed import probed
from trainer.data.loader.validation import CleanImages
from trainer.data.shards.index import Index
from trainer.engine.engine import Engine
from trainer.engine.place_clock import PROBE
from trainer.model.build import cost_of
from trainer.model.objective import Objective
from trainer.run.recorder import Recorder
from trainer.run.shutdown import Stop

Rows = list[tuple[Tensor, Observation]]


class ExampleProbe:
    """Observes clean images for level 1. Off (`on` is False, `observe` does nothing) under every other rule; then `clean` is None."""

    def __init__(
        self,
        config: Config,
        index: Index,
        engine: Engine,
        objective: Objective,
        examples: Examples,
        recorder: Recorder,
        stop: Stop,
        clean: CleanImages | None,
    ):
        self.settings = config.examples.probe
        self.on = self.settings is not None
        self._config, self._engine, self._objective, self._examples = config, engine, objective, examples
        self._recorder, self._stop, self._num_examples = recorder, stop, len(index)
        self._outputs = frozenset({"cls_attention"}) if examples.wants_spread else frozenset()
        self._clean = clean

    def due(self, state: TrainState) -> bool:
        """Whether the probe of the epoch that has just ended comes next."""
        return (
            self.on
            and state.batch == 0 < state.epoch < self._config.epochs
            and self._examples.uses_observations(state.epoch - 1)
        )

    def observe(self, state: TrainState, selection: Selection | None) -> bool:
        """Between two epochs, collective: probe the epoch before, whose examples are `selection`, if that is due.

        False if a stop was requested meanwhile: then nothing was observed, and a resume from `state` probes again.
        """
        if self.settings is None or selection is None or not self.due(state):
            return True
        with self._engine.heartbeat.clock.within(PROBE, state.step):
            return self._observe(state, selection)

    def _observe(self, state: TrainState, selection: Selection) -> bool:
        assert self.settings is not None
        epoch, started = state.epoch - 1, time.perf_counter()
        ids = probed(selection.keep, self._num_examples, self._config.seed, epoch, self.settings.probe_share)
        model, device = self._engine.model, self._engine.device
        was_training = model.training
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.eval()
            rows = self._passes(ids)
            model.train(was_training)
        if rows is None:
            return False
        sums = torch.zeros(2, dtype=torch.int64, device=device)
        for ids_of_rows, observation in rows:
            self._examples.observe(ids_of_rows, observation)
            sums += torch.stack([(observation.correct & observation.valid).sum(), observation.valid.sum()])
        right, counted = self._engine.all_reduce_sum(sums).tolist()
        facts: dict[str, Any] = {
            "epoch": epoch,
            "probed": counted,
            "right": right,
            "share": counted / max(selection.num_kept, 1),
            "keep_tokens": self.settings.probe_keep,
            "multiply_adds": cost_of(self._engine.module, self.settings.plan)["multiply_adds"],
            "hash": hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest(),
            "seconds": time.perf_counter() - started,
        }
        self._recorder.probed(state, facts)
        return True

    @torch.no_grad()
    def _passes(self, ids: Any) -> Rows | None:
        """Ids and observations of this rank's batches; None if a stop was requested on some rank."""
        assert self.settings is not None and self._clean is not None
        engine, device, found = self._engine, self._engine.device, []
        for batch in self._clean.of(ids):
            asked = torch.full((), float(self._stop.requested()), device=device)
            if engine.read_delayed(engine.all_reduce_sum(asked)):
                return None
            images = normalise(batch.images.to(device, non_blocking=True), self._config.augment)
            ids, labels, weights, rng_keys = (
                field.to(device, non_blocking=True) for field in (batch.ids, batch.labels, batch.weights, batch.rng_keys)
            )
            output = engine.forward(images, self.settings.plan, self._outputs, rng_keys)
            found.append((ids, self._objective.probed(labels, weights, output)))
        return found
