"""The Python API: the lines of the README, on shards of digits, in one process."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save

import trainer
from trainer import compare, evaluate, load_config, load_weights, read_run, run_training

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def readme(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variables after the lines of the README, run unchanged on shards of digits with two epochs; in runs/notebook."""
    folder = tmp_path_factory.mktemp("api")
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    before = 'load_config("configs/quickstart.yaml", name="notebook")'
    assert before in code
    code = code.replace(before, f"load_config({str(ROOT / 'configs' / 'quickstart.yaml')!r}, *WORDS, name='notebook')")
    names = {"WORDS": words(digits, folder)}
    handler = signal.getsignal(signal.SIGTERM)
    exec(code, names)
    assert signal.getsignal(signal.SIGTERM) is handler
    return names


def words(digits: Path, folder: Path) -> list[str]:
    shards = [f"data.train={digits}/train-*.tar", f"data.validation={digits}/validation-*.tar", "data.workers=0"]
    short = ["epochs=2", "optim.warmup=0ep", "plan.warmup=0ep", "plan.length=1ep", "tracking.to=journal"]
    # forgetting would never update in two epochs, which is refused
    short += ["examples={method: random_fixed, removed: 0.1}"]
    small = ["model.args.patch_size=8", "model.args.depth=4"]  # a sixth of the quickstart's multiply-adds
    return [*shards, *short, *small, f"runs={folder}"]


def test_the_lines_of_the_readme(readme: dict[str, Any]):
    result, steps, table, model = (readme[name] for name in ("result", "steps", "table", "model"))
    assert (result.status, result.directory.name) == ("finished", "notebook")
    assert steps["loss"].notna().all() and steps["step"].is_monotonic_increasing and "kind" not in steps
    assert list(table["density"]) == [1.0, 0.7, 0.7] and list(table["selection"])[-1] == "run's own plan"
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer) and not model.training
    size = load_config(result.directory).model.image_size
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 10)


def test_settings_keep_their_types(readme: dict[str, Any]):
    found = load_config(
        readme["result"].directory,
        name="7",
        stop_at=None,
        log_every="5step",
        data={"train": "a", "validation": "b", "cache": None, "batch": 32, "lanes": 2},
    )
    assert (found.name, found.stop_at, str(found.log_every), found.data.cache) == ("7", None, "5step", None)
    with pytest.raises(ValueError, match="name=None: must not be null"):
        load_config(readme["result"].directory, name=None)


def test_a_finished_run_is_evaluated_again(readme: dict[str, Any]):
    run = readme["result"].directory
    evals = read_run(run)["eval"]
    assert list(evals["epoch"])[-1] == 2 and evals["images"].eq(359).all()
    assert evaluate(run)["top1"].item() == pytest.approx(evals["top1"].iloc[-1]) == pytest.approx(readme["result"].top1)
    half = evaluate(run, None, [0.5], "evaluate.batch=64")  # overrides by position, and by keyword
    assert evaluate(run, densities=[0.5], evaluate={"batch": 64})["top1"].tolist() == half["top1"].tolist()
    with pytest.raises(ValueError, match=r"evaluate\.batch"):
        evaluate(run, evaluate={"batch": 0})


def test_another_run_in_the_same_process_and_two_seeds_in_one_row(readme: dict[str, Any]):
    first = load_config(readme["result"].directory)
    second = run_training(load_config(readme["result"].directory, "seed=1", name="second"))
    table = compare(readme["result"].directory, second.directory)
    assert first.seed == 0 and len(table) == 1 and table["seeds"].iloc[0] == [0, 1]
    top1 = [readme["result"].top1, second.top1]
    assert table["top1"].item() == pytest.approx(sum(top1) / 2) and bool(table["base"].item())
    assert table["top1_sd"].item() == pytest.approx(abs(top1[0] - top1[1]) / 2**0.5)


def test_a_run_under_ddp_after_one_under_deepspeed_in_the_same_process(readme: dict[str, Any]):
    alone = ["engine.kind=ddp", "engine.zero=0", "stop_at=1step"]
    assert run_training(load_config(readme["result"].directory, *alone, name="ddp")).status == "stopped"


def test_names_are_there_and_others_are_not():
    assert set(trainer.__all__) <= set(dir(trainer.api))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        trainer.trian  # noqa: B018


def test_weights_of_no_run(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no weights\.safetensors"):
        load_weights(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    with pytest.raises(ValueError, match="its header does not describe the network; write the file with trilevel export"):
        load_weights(tmp_path / "weights.safetensors")
