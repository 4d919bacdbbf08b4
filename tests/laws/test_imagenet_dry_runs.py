"""Each ImageNet recipe on real photographs: two processes, steps, evaluation, stop, resume, audit. Changed are only the batch (a CPU
computes 12 images), the lengths of the plan (8 steps, so that it ends), and weights that would be downloaded.

    pytest tests/laws/test_imagenet_dry_runs.py -m slow --images imagenet-sample-1000.tar     # about 2 minutes per recipe on two cores
"""

from __future__ import annotations

import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform

from tests.config.test_recipes import IMAGENET
from tests.conftest import ROOT, lines
from trainer.config.load import load
from trainer.data.loader.build import validation_set
from trainer.data.loader.dataset import open_indexes
from trainer.data.shards.pack import pack

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.timeout(1800)]
CLASSES, VALIDATION = 1000, 24
STEPS, STOP = 8, 5
SMALL = [
    "data.batch=12", "data.micro_batch=6", "data.lanes=4", "data.window=64", "data.workers=1", "evaluate.batch=12",
    f"stop_at={STEPS}step", "evaluate.every=4step", "checkpoint.every=1ep", "log_every=1step", "tracking.to=journal",
    "engine.compile=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> list[str]:
    """Shards of the photographs of --images (nXXXXXXXX_name.JPEG, one per class), all to train with and the first 24 to validate."""
    source = pytestconfig.getoption("--images")
    if not source:
        pytest.skip("wants real photographs: --images imagenet-sample-1000.tar")
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(source) as archive:
        for number, member in enumerate(sorted((m for m in archive if m.isfile()), key=lambda m: m.name)):
            data = archive.extractfile(member)
            assert data is not None
            pixels = data.read()
            name = Path(member.name).name
            for split in ("train", "val")[: 2 if number < VALIDATION else 1]:
                path = folder / "images" / split / name.split("_")[0] / name
                path.parent.mkdir(parents=True)
                path.write_bytes(pixels)
    pack(str(folder / "images"), folder / "shards", progress=False)
    return [f"data.{split}={folder}/shards/{split}-*.tar" for split in ("train", "validation")]


@pytest.mark.parametrize("name", IMAGENET)
def test_a_recipe_trains_stops_resumes_and_is_audited(name: str, photographs: list[str], trilevel: Any, tmp_path: Path) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config = load(path)
    words = [*SMALL, *photographs]
    if config.model.init == "timm":  # random weights of the same network: nothing is downloaded
        network = timm.create_model(config.model.name)
        save_file(network.state_dict(), tmp_path / "weights.safetensors")
        words.append("model.init=weights.safetensors")
    if config.teacher.source == "timm":
        words.append("teacher.from=weights.safetensors")
    if config.plan.method == "cosine":
        words += ["plan.warmup=0.01ep", "plan.length=0.06ep", "plan.plateaus=2"]  # of 84 steps or fewer
    trilevel(2, "train", str(path), *words, f"stop_at={STOP}step", timeout=900)
    trilevel(2, "train", str(path), *words, "--resume", timeout=900)
    run = tmp_path / "runs" / name
    steps = lines(run, "step")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in steps)
    assert abs(steps[0]["loss"] - math.log(CLASSES)) < 1.0 or config.teacher.source
    scores = lines(run, "eval")
    assert {line["images"] for line in scores} == {VALIDATION} and {line["step"] for line in scores} >= {4, STEPS}
    last = lines(run, "plateau")[-1]
    whole = lines(run, "start")[0]["multiply_adds"]
    assert (last["keep_tokens"] < 1) == (last["multiply_adds"] < whole) == (config.tokens.method != "all")
    shown = lines(run, "epoch")[0]["kept"]
    assert shown == round(CLASSES * (1 - getattr(config.examples.settings, "removed", 0.0)))
    assert "equal to the journal" in trilevel(1, "audit", str(run), timeout=900).stdout


def test_what_the_model_gets_is_what_timm_makes_of_the_photographs(photographs: list[str]) -> None:
    """Evaluation pixels of photographs of all shapes beside timm's own transform on PIL."""
    config = load(ROOT / "configs" / "deit_small_in1k.yaml", [*SMALL, *photographs])
    _, index = open_indexes(config.data)
    folder = Path(photographs[1].removeprefix("data.validation=")).parents[1] / "images" / "val"
    files = {path.stem: path for path in folder.rglob("*.JPEG")}
    transform = create_transform(
        224, interpolation=config.augment.interpolation, crop_pct=config.evaluate.crop_pct, normalize=False
    )
    differences = []
    for batch in validation_set(index, config, 0, 1):
        for number, pixels, weight in zip(batch.ids.tolist(), batch.images, batch.weights.tolist(), strict=True):
            if weight:
                photo = Image.open(files[Path(index.key(number)).name]).convert("RGB")
                timms: Any = transform(photo)  # uint8
                differences.append(float((pixels.float() - timms.float()).abs().mean()))
    assert len(differences) == VALIDATION
    assert max(differences) < 0.5, f"mean difference of a photograph: {max(differences):.2f} of 255 levels"
