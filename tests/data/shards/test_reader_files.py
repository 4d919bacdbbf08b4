"""A reader keeps the files open that it used last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.images import write_shards
from trainer.data.shards import reader
from trainer.data.shards.index import build_index


def test_the_file_that_was_not_read_for_longest_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_OPEN", 2)
    images = reader.Reader(build_index(write_shards(tmp_path, [1, 1, 1]), progress=False))
    for shard, still_open in ((0, {0}), (1, {0, 1}), (0, {0, 1}), (2, {0, 2}), (1, {1, 2})):
        (data,) = images.read(np.array([shard]))
        assert not isinstance(data, Exception) and set(images._files) == still_open
