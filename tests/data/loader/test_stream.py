"""The stream on real shards: the same batches on any world, dropped images cost no decode, broken ones keep their slot."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data.transforms_factory import create_transform

from sparsity.types import Selection
from tests.conftest import environment
from tests.support.images import config, jpeg, write_shards, write_tar
from trainer.data.augment import decode, turbojpeg
from trainer.data.augment.policy_on_device import apply_policy, codes_of
from trainer.data.batch import Batch
from trainer.data.errors import DataError
from trainer.data.loader.build import training_stream, validation_set
from trainer.data.loader.stream import Stream, _Task
from trainer.data.shards.index import Index, build_index
from trainer.preflight.verify_shards import verify

SIZES = [11, 1, 20, 8, 10]  # 50 images
AUGMENT = {"policy": "rand-m9-mstd0.5-inc1", "erasing": 0.5}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(write_shards(tmp_path_factory.mktemp("shards"), SIZES), progress=False)


def selection(n: int, removed: list[int], weight: np.ndarray | None = None) -> Selection:
    keep = np.ones(n, dtype=bool)
    keep[removed] = False
    return Selection(np.packbits(keep, bitorder="little"), int(keep.sum()), weight, {})


def joined(batches: list[Batch], field: str) -> torch.Tensor:
    """Rows of all ranks of one step, padding left out, in rank order."""
    return torch.cat([getattr(b, field)[b.ids >= 0] for b in batches])


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return all(torch.equal(joined(a, f), joined(b, f)) for f in Batch._fields if f != "broken")


def test_a_policy_on_the_device_gets_the_draws_of_the_workers(index: Index) -> None:
    """The same batches, with the operations beside the cropped pixels; applied to them, the workers' pixels."""
    plain, sections = config("x", augment=AUGMENT), config("x", augment=AUGMENT | {"policy_on": "device"})
    theirs, mine = (list(training_stream(index, one, 0, 1).epoch(0, None)) for one in (plain, sections))
    for a, b in zip(mine, theirs, strict=True):
        assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in Batch._fields if f not in ("images", "policy", "broken"))
        assert b.policy.shape[1] == 0 and a.policy.shape[1:] == (2, 2) and a.policy.dtype == torch.float64
        assert (a.policy[a.weights > 0, :, 0] > 0).any() and (a.policy[a.weights == 0] == 0).all()
        found = apply_policy(a.images, a.policy, codes_of(sections.augment), sections.augment)
        assert ((found.int() - b.images.int()).abs() <= 1).float().mean() > 0.85 and not torch.equal(a.images, b.images)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 1), (4, 0), (6, 0)])
def test_any_world_and_workers_give_the_same_global_batches(index: Index, world: int, workers: int) -> None:
    chosen = selection(50, list(range(0, 50, 7)))
    sections: dict[str, Any] = {"augment": AUGMENT}
    whole = training_stream(index, config("x", **sections), 0, 1)
    streams = [training_stream(index, config("x", data={"workers": workers}, **sections), rank, world) for rank in range(world)]
    for epoch in (0, 1, 0):  # persistent workers must see each epoch's own kept examples
        kept = chosen if epoch else None
        reference = list(whole.epoch(epoch, kept))
        assert len(reference) == (42 // 12 if epoch else 50 // 12)
        parts = [list(s.epoch(epoch, kept)) for s in streams]
        assert {len(p) for p in parts} == {len(reference)}
        for step, batch in enumerate(reference):
            ranks = [p[step] for p in parts]
            assert equal(ranks, [batch])
            assert {len(b.ids) for b in ranks} == {streams[0].batch_split.slots}
            for b in ranks:
                padding = b.ids < 0
                assert (b.weights[padding] == 0).all() and (b.images[padding] == 0).all() and (b.weights[~padding] == 1).all()
        shown = torch.cat([b.ids for b in reference])
        if kept is not None:
            assert not set(shown.tolist()) & set(range(0, 50, 7))
        assert (joined(reference, "labels") == shown % 4).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch_is_the_same(index: Index, workers: int) -> None:
    chosen = selection(50, [3, 4])
    one = list(training_stream(index, config("x", augment=AUGMENT), 0, 1).epoch(3, chosen))
    two = training_stream(index, config("x", augment=AUGMENT, data={"workers": workers}), 0, 1)
    for batch in two.epoch(7, None):  # another epoch dropped half way
        assert batch.images.shape == (12, 3, 32, 32)
        break
    rest = list(two.epoch(3, chosen, first_batch=2))
    assert len(rest) == len(one) - 2 and all(equal([a], [b]) for a, b in zip(one[2:], rest, strict=True))


def test_dropped_examples_are_not_decoded(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    box = decode.EncodedImage.box
    monkeypatch.setattr(decode.EncodedImage, "box", lambda self, *at: decoded.append(1) or box(self, *at))
    removed = list(range(0, 50, 3))
    stream = training_stream(index, config("x"), 0, 1)
    shown = sum(len(b.ids) for b in stream.epoch(0, selection(50, removed)))
    assert len(decoded) == shown == (50 - len(removed)) // 12 * 12
    decoded.clear()
    repeated = training_stream(index, config("x", data={"repeats": 3}), 0, 1)
    monkeypatch.undo()
    cut = turbojpeg.cut
    monkeypatch.setattr(turbojpeg, "cut", lambda *a: decoded.append(1) or cut(*a))
    shown = sum(len(b.ids) for b in repeated.epoch(0, None))
    assert len(decoded) == shown // 3, "copies of an image share one decode"


def test_copies_differ_and_epochs_differ(index: Index) -> None:
    stream = training_stream(index, config("x", data={"repeats": 2}), 0, 1)
    for batch in stream.epoch(0, None):
        assert (batch.ids[0::2] != batch.ids[1::2]).all() and set(batch.copies.tolist()) == {0, 1}
        for i in batch.ids.unique():
            a, b = (batch.ids == i).nonzero().flatten().tolist()
            assert not torch.equal(batch.images[a], batch.images[b]) and batch.rng_keys[a] != batch.rng_keys[b]
    stream = training_stream(index, config("x"), 0, 1)
    first, second = (torch.cat([b.rng_keys for b in stream.epoch(e, None)]) for e in (0, 1))
    assert not set(first.tolist()) & set(second.tolist())


def test_weights_of_a_selection_reach_their_rows(index: Index) -> None:
    weight = np.arange(50, dtype=np.float32) + 1
    for batch in training_stream(index, config("x"), 1, 4).epoch(0, selection(50, [0], weight)):
        assert torch.equal(batch.weights, torch.where(batch.ids >= 0, batch.ids + 1.0, 0.0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_selections_weight_gives_no_weight_to_broken_images(tmp_path: Path, workers: int) -> None:
    index = build_index(write_shards(tmp_path, [24], broken={3, 17}), progress=False)
    chosen = selection(24, [0], np.full(24, 2.5, np.float32))
    weights = {
        int(i): float(w)
        for batch in training_stream(index, config("x", data={"workers": workers, "batch": 22, "lanes": 1}), 0, 1).epoch(
            0, chosen
        )
        for i, w in zip(batch.ids, batch.weights, strict=True)
    }
    assert {weights.pop(i) for i in (-1, 3, 17) if i in weights} == {0.0}, "padding and broken images"
    assert len(weights) >= 19 and set(weights.values()) == {2.5}


def test_workers_follow_another_selection_of_the_same_epoch(index: Index) -> None:
    stream = training_stream(index, config("x", data={"workers": 1}), 0, 1)
    for removed in (range(25), range(25, 50)):
        shown = torch.cat([batch.ids for batch in stream.epoch(4, selection(50, list(removed)))])
        assert len(shown) == 24 and not set(shown.tolist()) & set(removed)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_keep_their_slot_and_are_named(tmp_path: Path, workers: int) -> None:
    files: dict[str, bytes] = {}
    for i in range(24):
        good = jpeg(i)
        files |= {f"k{i:02d}.jpg": {5: good[:300], 6: b"no image", 7: b""}.get(i, good), f"k{i:02d}.cls": b"0"}
    write_tar(tmp_path / "b-0.tar", files)
    pattern = str(tmp_path / "b-0.tar")
    index = build_index(pattern, progress=False)
    stream = training_stream(index, config("x", classes=2, data={"workers": workers, "repeats": 2, "batch": 24}), 0, 2)
    seen: dict[int, str] = {}
    for epoch in range(2):
        for batch in stream.epoch(epoch, None):
            bad = {i for i, _ in batch.broken}
            assert [int(i) in bad for i in batch.ids] == (batch.weights == 0).tolist()
            assert (batch.images[batch.weights == 0] == 0).all()
            seen |= dict(batch.broken)
    assert set(seen) <= {5, 6, 7} and seen
    assert all(f"b-0.tar key 'k0{i}'" in reason for i, reason in seen.items())
    found = verify(pattern, workers=2, progress=False)
    assert [b.id for b in found] == [5, 6, 7] and "k06" in found[1].where and "no image" in found[1].reason


@pytest.mark.parametrize(("world", "batch", "workers"), [(1, 8, 0), (2, 8, 1), (3, 7, 0), (4, 100, 0), (7, 3, 0), (64, 2, 0)])
def test_validation_shows_every_image_once(index: Index, world: int, batch: int, workers: int) -> None:
    settings = config("x", evaluate={"batch": batch}, data={"workers": workers})
    parts = [list(validation_set(index, settings, rank, world)) for rank in range(world)]
    lengths = {len(validation_set(index, settings, rank, world)) for rank in range(world)}
    assert lengths == {len(p) for p in parts} and len(lengths) == 1
    shown = torch.cat([b.ids[b.weights > 0] for p in parts for b in p])
    assert shown.tolist() == list(range(50))
    for step in range(len(parts[0])):
        assert len({len(p[step].ids) for p in parts}) == 1, "ranks compute batches of equal shape"
    for again in (0, 1):  # the same on a second pass
        assert torch.equal(next(iter(validation_set(index, settings, 0, world))).images, parts[0][0].images), again


def test_validation_pixels_are_timms(index: Index) -> None:
    theirs = create_transform(32, crop_pct=0.875, interpolation="bicubic", normalize=False)
    batch = next(iter(validation_set(index, config("x"), 0, 1)))
    for i in range(5):
        assert torch.equal(batch.images[i], theirs(PIL.Image.open(io.BytesIO(jpeg(i)))))  # pyright: ignore


def test_refusals(index: Index) -> None:
    with pytest.raises(DataError, match=r"train-0000.tar key 'img00002': label 2 is outside model.classes=2 .*model.classes=4"):
        training_stream(index, config("x", classes=2), 0, 1)
    with pytest.raises(DataError, match=r"outside model.classes=3"):
        validation_set(index, config("x", classes=3), 0, 1)
    with pytest.raises(ValueError, match=r"data.batch=12 on 7 processes"):
        training_stream(index, config("x"), 0, 7)
    with pytest.raises(ValueError, match=r"50 kept examples are too few for a batch of data.batch=64"):
        next(training_stream(index, config("x", data={"batch": 64}), 0, 1).epoch(0, None))
    with pytest.raises(ValueError, match=r"augment.policy='rend'"):
        training_stream(index, config("x", augment={"policy": "rend"}), 0, 1)


def test_a_shard_lost_in_the_run_breaks_its_images_only(tmp_path: Path) -> None:
    index = build_index(write_shards(tmp_path, [12, 12]), progress=False)
    os.truncate(tmp_path / "train-0001.tar", 100)
    batches = list(training_stream(index, config("x"), 0, 1).epoch(0, None))
    broken = dict(b for batch in batches for b in batch.broken)
    assert sorted(broken) == list(range(12, 24)) and "train-0001.tar" in broken[12]
    assert sum(float(b.weights.sum()) for b in batches) == 12


def test_a_process_that_fails_with_workers_running_ends(index: Index, tmp_path: Path) -> None:
    """An uncaught error's traceback keeps the stream alive to the end; its workers ignore multiprocessing's SIGTERM."""
    script = f"""
from tests.support.images import config
from trainer.data.shards.index import Index
from trainer.data.loader.build import training_stream

def fail():
    stream = training_stream(Index({str(index.path)!r}), config({str(index.root)!r}, data={{"workers": 2}}), 0, 1)
    next(stream.epoch(0, None))
    raise RuntimeError("on purpose")

fail()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "on purpose" in done.stderr and "DataLoader worker" not in done.stderr


AUGMENTS: list[dict[str, Any]] = [
    {},
    {"color_jitter": 0.3},
    {"policy": "three_augment", "color_jitter": 0.3, "crop": "src"},
    {"policy": "rand-m9-mstd0.5-inc1", "erasing": 0.5},
    {"policy": "rand-m9-mstd101-inc1-tweights"},
    {"policy": "originalr-mstd0.5"},
    {"policy": "augmix-m3-w3"},
    {"policy": "rand-m9-mstd0.5-inc1", "policy_on": "device"},
    {"crop": "shift", "shift": 2},
]


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_data_sets_can_be_sent_to_workers_that_are_not_forked(index: Index, augment: dict[str, Any]) -> None:
    """Under the start methods spawn and forkserver: "Can't pickle local object 'policy_of.<locals>.<lambda>'"."""
    settings = config("x", augment=augment, data={"workers": 1})
    for built in (training_stream(index, settings, 0, 1), validation_set(index, settings, 0, 1)):
        own: Any = built._loader.dataset
        sent = pickle.loads(pickle.dumps(own))
        task: Any = _Task(1, 0, 0, False) if isinstance(built, Stream) else (np.arange(4), 4)
        for ours, theirs in zip(own[task], sent[task], strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_give_the_same_batches(index: Index, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(workers: int) -> list[Batch]:
        made = training_stream(index, config("x", augment=AUGMENT, data={"workers": workers}), 0, 1)
        made._loader.multiprocessing_context = method if workers else None
        return list(made.epoch(0, selection(len(index), [3, 17])))

    assert equal(batches(0), batches(2))
