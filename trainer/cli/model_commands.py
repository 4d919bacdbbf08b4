"""Handlers of the commands around trained weights: eval, calibrate, export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer.cli.output import configuration, show, show_table, write_json
from trainer.config.errors import ConfigError


def evaluate(a: argparse.Namespace) -> None:
    from trainer.analysis.evaluation.densities import score

    config, densities = _own_or_given(a), None if a.densities is None else _densities(a.densities, "--densities")
    sparse = any(density < 1 for density in densities or ())  # beside those, a teacher's own choice
    flags = {"adaptive": a.adaptive, "random": a.random, "least": a.least, "teacher": a.teacher if sparse else None}
    found = score(a.model, config, densities, a.overrides, **flags)
    show_table(found.table())
    write_json(a.json, found.facts())
    if a.teacher:
        from trainer.analysis.evaluation.teacher_agreement import agreement

        found_rank = agreement(a.model, a.teacher, config, a.overrides)
        show(f"rank correlation (Spearman) of the importance of tokens with the attention of {a.teacher}: {found_rank:.3f}")
    if a.plots:
        from trainer.analysis.evaluation.pictures import write

        for path in write(found, Path(a.plots)):
            show(str(path))


def calibrate(a: argparse.Namespace) -> None:
    from trainer.analysis.evaluation.calibrate import calibrate

    if a.images < 1:
        raise ConfigError(f"--images {a.images}: must be >= 1")
    found = calibrate(a.model, _own_or_given(a), _densities(a.density, "--density"), a.images, a.overrides)
    show_table(found.table())
    write_json(a.json, found.facts())


def _own_or_given(a: argparse.Namespace) -> Any:
    """The CONFIG of the command line, None for the run's own; `eval RUN key=value` changes that."""
    if a.config and "=" in a.config:
        a.config, a.overrides = None, [a.config, *a.overrides]
    return configuration(a) if a.config else None


def _densities(text: str, option: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < density <= 1 for density in found):
        raise ConfigError(
            f"{option} {text or repr(text)}: must be keep ratios in (0, 1], separated by commas, e.g. 1.0,0.7,0.5"
        )
    if twice := sorted({one for one in found if found.count(one) > 1}):
        raise ConfigError(f"{option} {text}: {twice[0]:g} is given twice; name each keep ratio once")
    return found


def export(a: argparse.Namespace) -> None:
    if a.adaptive:
        onnx = (
            "ONNX has the same number of tokens for every image of a batch; leave --adaptive out for the value-based form, or export "
            "OUT.safetensors, which trainer.load_model runs with adaptive=True"
        )
        other = "the file has the thresholds of trilevel calibrate in its header without it; leave --adaptive out"
        raise ConfigError(f"export {a.out} --adaptive: {onnx if Path(a.out).suffix == '.onnx' else other}")
    if Path(a.out).suffix == ".onnx":
        from trainer.checkpoint.export_onnx import export_onnx

        if a.density is None:
            raise ConfigError(
                f"export {a.out}: an ONNX file has one density; add --density, e.g. --density .5, or 1 for all tokens"
            )
        if a.form == "blocks":
            raise ConfigError(
                f"export {a.out} --blocks: ONNX has no such form; leave it out (zeros included), or name it OUT.safetensors"
            )
        densities = _densities(a.density, "--density")
        if len(densities) > 1:
            raise ConfigError(f"--density {a.density}: an ONNX file has one density; write one file for each")
        if a.calibration is not None and not a.int8:
            raise ConfigError(f"--calibration {a.calibration}: only with --int8; float32 has no ranges to find")
        images = (256 if a.calibration is None else a.calibration) if a.int8 else None
        show(export_onnx(a.run_directory, a.out, densities[0], a.checkpoint, a.ema, a.form, images).text())
        return
    if a.int8 or a.calibration is not None:
        raise ConfigError(f"export {a.out} --int8: only for an ONNX file; name it OUT.onnx")
    if a.density is not None:
        raise ConfigError(f"--density {a.density}: only for an ONNX file; a safetensors file answers at any density")
    from trainer.checkpoint.export import export

    show(export(a.run_directory, a.out, a.checkpoint, a.ema, a.form).text())
