"""`trilevel export`: the weights of a checkpoint as one safetensors file that timm loads, from any ZeRO stage and world size.

A checkpoint has every weight unsharded, by timm's name, so nothing is converted. The file's header describes its origin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from sparsity.vit import SparseViT
from trainer.checkpoint import directory, save_load
from trainer.config.errors import ConfigError
from trainer.config.load import parse_recorded
from trainer.config.run_config import Config
from trainer.config.schema import ModelConfig
from trainer.journal.file import JournalError
from trainer.journal.reader import lineage
from trainer.model import importance, pruned_file, stored_form, thresholds
from trainer.model.build import build_model
from trainer.model.exported import TOKENS
from trainer.model.origin import header_of
from trainer.model.thresholds import Thresholds
from trainer.model.weights import fixes_image_size, save_weights


class Exported(NamedTuple):
    """The file and its header. notes: what of the run is not in it."""

    path: Path
    about: dict[str, str]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        about = self.about
        size = f", img_size={about['image_size']}" if fixes_image_size(about["model"]) else ""
        words = f"timm.create_model({about['model']!r}, num_classes={about['classes']}{size}"
        more = "".join(f", {key}={value!r}" for key, value in json.loads(about["args"]).items())
        which = "EMA weights" if about["ema"] == "true" else "weights"
        sparse = json.loads(about[TOKENS])["method"] != "all"
        adaptive = ", adaptive=True" if thresholds.HEADER in about else ""
        at = f"\nor at any density: trainer.load_model({str(self.path)!r})(images, density=.5{adaptive})" if sparse else ""
        at_density = f" at density {about['top1_density']}" if sparse and "top1" in about else ""
        top1 = f", top-1 {100 * float(about['top1']):.2f} %{at_density}" if "top1" in about else ", not evaluated"
        first = f"{self.path}: {which} of step {about['step']}{top1}"
        at += "".join(f"\n{note}" for note in self.notes)
        if only := stored_form.described(about):
            return f"{first}\n{only}; load it with trainer.load_model({str(self.path)!r}), plain timm cannot build it{at}"
        return f"{first}\n{words}{more}, checkpoint_path={str(self.path)!r}){at}"


def export(run: Path | str, out: Path | str, which: str = "latest", ema: bool | None = None, form: str = "dense") -> Exported:
    """Write the weights of a run's checkpoint to `out`. which: "latest", "best" or the checkpoint's folder. ema: True: EMA weights;
    False: raw weights; None: EMA weights if there are any. form: see `model.pruned_file`: "dense", "compact" or "blocks".

    Raises ConfigError or CheckpointError with a remedy; replaces an existing `out` atomically.
    """
    path, about = _chosen(Path(run), which)
    config = parse_recorded(about["config"], str(path))
    averages = load_file(path / "ema.safetensors")
    if ema and not averages:
        raise ConfigError(f"export --ema: {path} has no EMA weights (optim.ema=null); use --raw")
    use_ema = bool(averages) if ema is None else ema
    weights = averages if use_ema else load_file(path / "weights.safetensors")
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"export {out}: file name must end with .safetensors, timm needs it")
    header = _network(config.model) | header_of(config)
    header |= {"run": config.name, "config": config.fingerprint()} | _position(about["state"], use_ema)
    score = _score(config, about)
    header[TOKENS] = json.dumps(config.resolved()["tokens"] | ({importance.KEY: score.selection} if score.selection else {}))
    found = thresholds.read(Path(run))
    if found is not None:
        theirs = score.default_of_mass if found.importance == "default" else found.importance
        if ([found.block], theirs) != (list(config.tokens.blocks), score.selection):
            raise ConfigError(
                f"export {run}: its thresholds were calibrated for tokens.blocks=[{found.block}] tokens.importance={theirs}, the run "
                f"has {list(config.tokens.blocks)} {score.selection}; calibrate it again without tokens.*, or remove "
                f"{Path(run) / thresholds.FILE}"
            )
    if found is not None and found.weights == thresholds.weights_hash(weights):  # else they were calibrated for other weights
        header[thresholds.HEADER] = found.to_json()
    form_header, weights = pruned_file.written(form, config, weights, save_load.pruning_of(path), str(run))
    header |= form_header
    if stored_form.changes_importance(header):
        header.pop(thresholds.HEADER, None)
    elif form != "dense" and found is not None and thresholds.HEADER in header:
        header[thresholds.HEADER] = replace(found, weights=thresholds.weights_hash(stored_form.read(weights, header))).to_json()
    if (scored := _top1(Path(run), about["state"]["step"], use_ema)) is not None:
        header["top1"], header["top1_density"] = str(scored[0]), f"{scored[1]:g}"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(out, weights, header)
    return Exported(out, header, _without(found, header, run, out))


def _without(found: Thresholds | None, header: Mapping[str, str], run: Path | str, out: Path) -> tuple[str, ...]:
    """A note where the thresholds of the run are not in the file."""
    if found is None or thresholds.HEADER in header:
        return ()
    which = f"the {'EMA' if header['ema'] == 'true' else 'raw'} weights of step {header['step']}"
    why = "their mass is another without the pruned heads"
    if not stored_form.changes_importance(header):
        why = f"{Path(run) / thresholds.FILE} was calibrated for other weights than {which}"
    densities = ",".join(f"{one:g}" for one in sorted(found.by_density))
    return (f"thresholds left out: {why}; run trilevel calibrate {out} {run}/config.yaml --density {densities}",)


class _Score(NamedTuple):
    """selection: name of the score of tokens, "" where the run has none. default_of_mass: what thresholds mean by "default"."""

    selection: str
    default_of_mass: str


def _score(config: Config, about: Mapping[str, Any]) -> _Score:
    """Of a checkpoint."""
    if not hasattr(config.tokens.settings, importance.KEY):
        return _Score("", "")
    network = build_model(config.changed(model={"init": "random"}))
    if not isinstance(network, SparseViT):  # in windows there is one score
        return _Score("", "")
    before = network.about.default_before()
    if (name := about.get(importance.KEY)) is None:  # of a run that is older than names of scores
        own = getattr(config.tokens.settings, importance.KEY)
        name = before[0] if own == "default" else network.importance
    return _Score(name, before[1])


def _chosen(run: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint, verified, and its `state.json`."""
    folder = run / "checkpoints"
    if which not in ("latest", "best"):
        path = Path(which)
        path = path if path.is_dir() else folder / which
    else:
        found = save_load.latest(folder)
        if found is None:
            raise ConfigError(f"export {run}: no checkpoint; give the directory of a run with one, e.g. runs/NAME")
        path = found
    about = _examined(path)
    if which == "best":
        step = about["state"]["best_step"]
        names = [name for name in directory.by_age([p.name for p in folder.iterdir()]) if directory.step_of(name) == step]
        if not names:
            raise ConfigError(f"export {run} --checkpoint best: no evaluated checkpoint was kept (checkpoint.best); use latest")
        path = folder / names[-1]
        about = _examined(path)
    return path, about


def _examined(path: Path) -> dict[str, Any]:
    try:
        return directory.verify(path)
    except directory.Damaged as error:
        raise save_load.CheckpointError(f"{path.parent}: {error}; export another one with --checkpoint PATH") from error


def _network(model: ModelConfig) -> dict[str, str]:
    """What it takes to build the network; strings, as safetensors requires."""
    return {
        "model": model.name,
        "classes": str(model.classes),
        "image_size": str(model.image_size),
        "args": json.dumps(model.args),
    }


def _position(state: dict[str, Any], ema: bool) -> dict[str, str]:
    """Where in the run the weights are from."""
    progress = f"{state.get('progress') or state['epoch']:g}"
    return {"step": str(state["step"]), "progress": progress, "ema": json.dumps(ema), "chain": state["chain"]}


def _top1(run: Path, step: int, ema: bool) -> tuple[float, float] | None:
    """Top-1 of these weights in the run's own evaluation, and its keep ratio of tokens; None if it did not evaluate them."""
    try:
        scores = [line for line in lineage(run) if line["kind"] == "eval" and (line["step"], line["ema"]) == (step, ema)]
    except JournalError:
        return None
    return (scores[-1]["top1"], scores[-1]["keep_tokens"]) if scores else None
