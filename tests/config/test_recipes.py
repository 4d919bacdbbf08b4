"""Every recipe loads strictly, fits the libraries it names, passes the check, and differs from its control in nothing else."""

import re
from pathlib import Path

import pytest
import yaml

from sparsity.types import Plan
from trainer.config.load import load
from trainer.config.run_config import Config
from trainer.data.augment.transform import Transform
from trainer.data.order import micro_batches
from trainer.model.build import build_objective, build_schedule
from trainer.model.optimizer import refuse_unknown
from trainer.preflight.check import check
from trainer.preflight.parity import parity
from trainer.preflight.timm_recipe import Timm

FOLDER = Path(__file__).resolve().parents[2] / "configs"
ALL = sorted(path.stem for path in FOLDER.glob("*.yaml"))
IMAGENET = [name for name in ALL if "in1k" in name or name.startswith("tri_level")]
TRI_LEVEL = [name for name in ALL if name.startswith("tri_level")]
SMALL = ["model.image_size=32", "model.args={embed_dim: 24, depth: 2, num_heads: 3}"]
OTHERS = {
    "swin_tiny_in1k": [
        "model.image_size=32",
        "model.args={patch_size: 2, window_size: 4, embed_dim: 12, num_heads: [1, 2, 2, 2]}",
        "engine.compile=false",  # to the bit, and compiling takes 40 s
    ],
    "examples_convnext_tiny_in1k": [
        "model.image_size=32",
        "model.args={depths: [1, 1, 2, 1], dims: [8, 8, 16, 16]}",
        "examples={}",
    ],
    "examples_resnet50_in1k": [
        "model.image_size=32",
        "model.args={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}",
        "examples={}",
    ],
}
# 1,437 digits in place of ImageNet, in batches a CPU computes
DIGITS = ["data.batch=48", "data.micro_batch=24", "data.lanes=4", "data.window=64", "data.workers=0", "model.classes=10"]


def shards(folder: Path) -> list[str]:
    return [f"data.train={folder}/train-*.tar", f"data.validation={folder}/validation-*.tar"]


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_loads_and_describes_itself(name):
    path = FOLDER / f"{name}.yaml"
    config = load(path)
    assert config.name == name
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head, "a recipe begins with a comment"
    for word in ("Command:", "Expect:", "Measured:"):
        assert word in head.group(), f"the head comment has no {word!r}"
    assert f"{name}.yaml" in head.group() or "make " in head.group()
    assert max(map(len, path.read_text().splitlines())) <= 128


@pytest.mark.parametrize("name", ALL)
def test_every_file_fits_what_it_names(name):
    config = load(FOLDER / f"{name}.yaml")
    refuse_unknown(config.optim.name)
    build_objective(config)
    Transform(config.augment, config.model.image_size, train=True)
    schedule = build_schedule(config)
    assert schedule.last() == Plan(config.tokens.settings.final_keep, config.connections.settings.final_keep)
    assert schedule.lr(config.optim.warmup) > 0.9 * config.optim.lr
    for world in (1, 8, 16, 32) if name in IMAGENET else (1, 2, 3):
        batch_split = micro_batches(config.data.batch, config.data.micro_batch, world)
        assert batch_split.micro_batch <= config.data.micro_batch


@pytest.mark.parametrize("name", IMAGENET)
def test_recipes_pass_the_check_against_given_shards(name, digits):
    overrides = [o for o in DIGITS if "classes" not in o]
    overrides += (
        ["model.init=random", "teacher={}"] if "sait" in name or "blocks" in name else []
    )  # timm's weights are downloaded
    found = check(load(FOLDER / f"{name}.yaml", [*shards(digits), *overrides]), world=2)
    sizes = {
        "deit_tiny": 5.7,
        "deit3?_small": 22.0,
        "deit_base": 86.6,
        "swin_tiny": 28.3,
        "swin_small": 49.6,
        "convnext_tiny": 28.6,
        "resnet50": 25.6,
    }
    size = next(millions for pattern, millions in sizes.items() if re.search(pattern, name))
    assert found.parameters / 1e6 == pytest.approx(size, rel=0.01)
    assert found.steps > 0 and (found.share() < 0.95) == (name in TRI_LEVEL or "sait" in name or "tome" in name)
    assert "tome" not in name or found.share() == pytest.approx(0.719, abs=5e-4), "as its head comment says"


@pytest.mark.parametrize("name", TRI_LEVEL)
def test_tri_level_differs_from_its_control_in_the_levels_only(name):
    ours, control = (
        yaml.safe_load((FOLDER / f"{stem}.yaml").read_text()) for stem in (name, "_".join([*name.split("_")[2:4], "in1k"]))
    )
    levels = {"examples", "tokens"} | ({"connections", "plan"} if "deit" in name else set())
    assert {k: v for k, v in ours.items() if k not in levels | {"name"}} == {k: v for k, v in control.items() if k != "name"}
    assert levels <= ours.keys()
    ratio = float(name.split("_")[-1])
    assert ours["tokens"]["keep"] == ratio and ours["examples"]["removed"] == {0.9: 0.1, 0.8: 0.2, 0.7: 0.2}[ratio]


def test_tome_differs_from_its_control_in_the_tokens_and_has_the_plan_of_tri_level():
    files = ("tome_deit_small_in1k", "deit_small_in1k", "tri_level_deit_small_0.7")
    ours, control, tri_level = (yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in files)
    assert ours == control | {"name": files[0], "plan": tri_level["plan"], "tokens": tri_level["tokens"] | {"method": "tome"}}


def test_tokens_and_cost_of_the_tri_level_recipes_are_the_published_ones(digits):
    golden = {"0.9": ([177, 160, 144], 0.133), "0.8": ([157, 126, 101], 0.251), "0.7": ([138, 97, 68], 0.348)}
    for ratio, (tokens, saved) in golden.items():
        overrides = [*shards(digits), *(o for o in DIGITS if "classes" not in o), "connections.method=all"]
        last = check(load(FOLDER / f"tri_level_deit_small_{ratio}.yaml", overrides), world=1).plateaus[-1]
        assert last.stretch.start == 110
        assert sorted({n - 1 for n in last.tokens} - {196}, reverse=True) == tokens
        dense = check(load(FOLDER / "deit_small_in1k.yaml", overrides), world=1).dense
        assert 1 - last.multiply_adds / dense == pytest.approx(saved, abs=0.002)


@pytest.mark.parametrize("name", ["deit_tiny_in1k", "deit3_small_in1k_90ep", "quickstart_dense", *OTHERS])
def test_dense_recipes_equal_timm_to_the_bit_on_a_tiny_model_of_the_family(name, digits):
    small = OTHERS.get(name, SMALL if name in IMAGENET else [])
    config: Config = load(FOLDER / f"{name}.yaml", [*shards(digits), *DIGITS, *small])
    certificate = parity(config, steps=12)
    assert certificate.equal, str(certificate)
    assert Timm(config, 10, "cpu").optimizer.__class__.__name__ == (
        "Lamb" if "deit3" in name else "SGD" if "resnet" in name else "AdamW"
    )
