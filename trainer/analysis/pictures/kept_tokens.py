"""`trilevel show RUN IMAGE ...`: which tokens of an image remain after each pruning block, which keys a token attends to, and which
examples a run forgot most and least. Drawn with the run's final plan, evaluation transform and newest weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sparsity.types import VisibleKeys
from trainer.analysis.pictures.forgotten_examples import contact_sheet
from trainer.config.errors import ConfigError
from trainer.config.load import load_run
from trainer.data.augment.on_device import normalise
from trainer.data.augment.transform import Transform
from trainer.data.errors import DataError
from trainer.journal.file import JournalError
from trainer.journal.reader import lineage
from trainer.journal.run_weights import run_weights
from trainer.model import weights
from trainer.model.build import build_model, build_schedule
from trainer.storage.text import plot_text

CHOSEN, SEEN = "#D55E00", "#E69F00"  # the chosen token, the keys it attends to
FADED = np.array([205, 215, 232], dtype=np.float32)  # colour of removed patches, neither black nor white
WIDTH = 2.4  # inches of a panel
EXAMPLES = "examples.png"


class TokenView(NamedTuple):
    """One image through the network.

    pixels: (S, S, 3) uint8.
    grid: patches down and across.
    predicted: name of the class, its number where the run has no names; truth: the class that the image's path names, or "".
    kept: {block: (k,) patch ids, ascending}.
    token: id of the chosen patch.
    seen: {block: (j,) ids of the tokens that the chosen one attends to from this block on, -1 for a fused one}; without the blocks
    after its removal.
    keys: {block: number of remaining tokens}.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    predicted: str
    truth: str
    kept: dict[int, np.ndarray]
    token: int
    seen: dict[int, np.ndarray]
    keys: dict[int, int]


class Viewer:
    """A run's network in evaluation mode. Raises ConfigError for a run without weights, or one that keeps all tokens and connections."""

    def __init__(self, run: Path | str, overrides: Sequence[str] = ()) -> None:
        self.run, self.config = Path(run), load_run(run, overrides)
        self.model = build_model(self.config.changed(model={"init": "random"}))
        if not self.model.blocks:
            raise ConfigError(
                f"show {run}: tokens.method=all and connections.method=all, so every token survives; nothing to show"
            )
        file = run_weights(self.run, f"show {self.run}")
        weights.fit(self.model.network, weights.load_weights(file), str(file))
        self.model.eval()
        self.plan, self.names = build_schedule(self.config).last(), class_names(self.run)
        self.transform = Transform(
            self.config.augment, self.config.model.image_size, train=False, crop_pct=self.config.evaluate.crop_pct
        )

    @torch.no_grad()
    def look(self, image: Path | str, token: int | None = None) -> TokenView:
        """token: a patch id, counted from 0 in reading order; None: the kept one nearest to the middle. Raises ConfigError."""
        try:
            pixels = self.transform(memoryview(Path(image).read_bytes())).pixels
        except (OSError, ValueError) as error:
            raise ConfigError(f"show {image}: can't be read as an image: {error}") from error
        images = normalise(pixels[None], self.config.augment)
        output = self.model(images, self.plan, frozenset({"kept", "keys"}))
        assert output.kept is not None and output.keys is not None
        across, down = self.model.grid[::-1]
        if token is not None and not 0 <= token < across * down:
            raise ConfigError(f"--token {token}: must be 0 to {across * down - 1} (patches in reading order)")
        orders = {block: ids[0].numpy() for block, ids in output.kept.items()}  # fused tokens have id -1
        last = orders[max(orders)]
        if token is None:
            survivors = last[last >= 0]
            away = np.hypot(survivors // across - (down - 1) / 2, survivors % across - (across - 1) / 2)
            token = int(survivors[away.argmin()])
        seen, num_prefix = {}, getattr(self.model.network, "num_prefix_tokens", 0)
        for block, ids in orders.items():
            if token in ids:
                among = _visible(output.keys.get(block), int(np.flatnonzero(ids == token)[0]), num_prefix)
                seen[block] = np.sort(ids if among is None else ids[among[among < len(ids)]])
        kept = {block: np.sort(ids[ids >= 0]) for block, ids in orders.items()}
        number = int(output.logits[0].argmax())
        predicted, truth = self.names[number] if number < len(self.names) else str(number), truth_of(Path(image), self.names)
        keys = {block: len(ids) for block, ids in orders.items()}
        return TokenView(pixels.permute(1, 2, 0).numpy(), (down, across), predicted, truth, kept, token, seen, keys)

    @property
    def faded(self) -> str:
        """Where the patches that fade went, if they were not simply left out."""
        fate = self.config.tokens.settings.dropped_are
        return f"   ·   faded patches are {fate}" if fate else ""


def class_names(run: Path) -> list[str]:
    """The classes of a run in order, from its journal; [] without one."""
    try:
        return next(([str(name) for name in line.get("classes") or ()] for line in lineage(run) if line["kind"] == "start"), [])
    except JournalError:
        return []


def truth_of(image: Path, names: Sequence[str]) -> str:
    """The class that an image's path names, as in class folders (cat/1.jpg, cat/images/1.jpg) and flat files (cat_1.jpg); "" for none."""
    known = set(names)
    texts = [*(parent.name for parent in list(image.parents)[:2]), image.stem.partition("_")[0]]
    return next((text for text in texts if text in known), "")


def show(
    run: Path | str, images: Sequence[str], out: Path, token: int | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Write one plot per image, and examples.png if the run counts forgetting events; returns the files written.

    Without checkpoint or shards examples.png can't be made: a message if images were given, else ConfigError or DataError. Raises
    ConfigError if there is nothing to show.
    """
    config = load_run(run, overrides)
    counts = config.examples.settings.counts_forgetting
    if not images and not counts:
        raise ConfigError(
            f"show {run}: examples.method={config.examples.method} does not count forgetting events, so no examples to show; give an IMAGE"
        )
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    if images:
        viewer = Viewer(run, overrides)
        for image in images:
            path = out / f"{Path(image).stem}.png"
            path = path if path not in (*paths, out / EXAMPLES) else out / f"{Path(image).stem}-{len(paths)}.png"
            paths.append(draw(viewer.look(image, token), path, f"{viewer.run.name}   ·   {Path(image).name}{viewer.faded}"))
    if counts:
        try:
            paths.append(contact_sheet(Path(run), out / EXAMPLES, overrides))
        except (ConfigError, DataError) as error:
            if not images:
                raise
            print(f"no examples.png: {error}", file=sys.stderr)
    return paths


def draw(looked: TokenView, path: Path, title: str) -> Path:
    """Upper row: the image, then the tokens left after each pruning block. Lower row, with level 3: keys of the chosen token."""
    blocks = sorted(looked.kept)
    total = looked.grid[0] * looked.grid[1]
    connected = any(len(seen) < looked.keys[block] for block, seen in looked.seen.items())
    figure = Figure(figsize=(WIDTH * (1 + len(blocks)), (WIDTH + 0.3) * (1 + connected) + 0.4), dpi=130, layout="constrained")
    panels = np.atleast_2d(figure.subplots(1 + connected, 1 + len(blocks)))
    for axes in panels.flat:
        axes.set_axis_off()
    truth = f", is {looked.truth}" if looked.truth else ""
    _panel(panels[0, 0], looked, None, plot_text(f"input, predicted {looked.predicted}{truth}"))
    for axes, block in zip(panels[0, 1:], blocks, strict=True):
        left = looked.kept[block]
        _panel(axes, looked, left, f"after block {block}: {len(left)} of {total} tokens")
    if connected:
        _panel(panels[1, 0], looked, None, f"token {looked.token}")
        _mark(panels[1, 0], looked, [looked.token], CHOSEN)
        for axes, block in zip(panels[1, 1:], blocks, strict=True):
            if block not in looked.seen:
                _panel(axes, looked, looked.kept[block], f"token {looked.token} was removed")
                continue
            seen = looked.seen[block]
            patches = seen[seen >= 0]
            _panel(axes, looked, patches, f"attends to {len(seen)} of {looked.keys[block]} keys")
            _mark(axes, looked, patches, SEEN)
            _mark(axes, looked, [looked.token], CHOSEN)
            lines = [[_middle(looked, looked.token), _middle(looked, int(key))] for key in patches]
            axes.add_collection(LineCollection(lines, colors=SEEN, linewidths=0.7, alpha=0.8))
    figure.suptitle(plot_text(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    FigureCanvasAgg(figure).print_png(path)
    return path


def _visible(keys: VisibleKeys | None, patch: int, num_prefix: int) -> np.ndarray | None:
    """Positions among the remaining patches that the patch at position `patch` attends to; None: all."""
    if keys is None:
        return None
    if keys.mask is not None:
        positions = keys.mask[0, 0, num_prefix + patch].nonzero().flatten()
    else:
        assert keys.index is not None
        positions = keys.index[0]
    return (positions[positions >= num_prefix] - num_prefix).numpy()


def _panel(axes: Axes, looked: TokenView, bright: np.ndarray | None, title: str) -> None:
    """The image, with all patches but `bright` faded."""
    pixels = looked.pixels.astype(np.float32)
    if bright is not None:
        shown = np.zeros(looked.grid[0] * looked.grid[1], dtype=bool)
        shown[bright] = True
        high, wide = (side // count for side, count in zip(pixels.shape, looked.grid, strict=False))
        whole = shown.reshape(looked.grid).repeat(high, 0).repeat(wide, 1)[..., None]
        pixels = np.where(whole, pixels, FADED + 0.15 * (pixels - FADED))
    axes.imshow(pixels.astype(np.uint8), interpolation="nearest")
    axes.add_patch(Rectangle((-0.5, -0.5), pixels.shape[1], pixels.shape[0], fill=False, edgecolor="#B0B0B0", linewidth=0.8))
    axes.set_title(title, fontsize=9)


def _mark(axes: Axes, looked: TokenView, patches: Any, color: str) -> None:
    wide, high = looked.pixels.shape[1] / looked.grid[1], looked.pixels.shape[0] / looked.grid[0]
    for patch in patches:
        x, y = _middle(looked, int(patch))
        corner = (x - wide / 2, y - high / 2)
        axes.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=color, linewidth=2.0 if color == CHOSEN else 0.9))


def _middle(looked: TokenView, patch: int) -> tuple[float, float]:
    """x, y in pixels of a patch's middle."""
    across = looked.grid[1]
    wide, high = looked.pixels.shape[1] / across, looked.pixels.shape[0] / looked.grid[0]
    return (patch % across + 0.5) * wide - 0.5, (patch // across + 0.5) * high - 0.5
