"""`show`: the patches it draws are those the network kept, the connections those of the chosen token, the examples by score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from tests.support import images
from trainer.__main__ import main
from trainer.analysis.pictures.forgotten_examples import ranked
from trainer.analysis.pictures.kept_tokens import FADED, Viewer, draw, show, truth_of
from trainer.checkpoint.save_load import save_checkpoint
from trainer.checkpoint.state import TrainState
from trainer.config.errors import ConfigError
from trainer.config.run_config import Config
from trainer.data.shards.index import build_index
from trainer.model.build import build_examples, build_model
from trainer.model.weights import save_weights

TINY = {"name": "deit_tiny_patch16_224", "classes": 4, "image_size": 32}
TINY["args"] = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def made(folder: Path, pattern: str = "nowhere", **more: Any) -> tuple[Path, Config]:
    """A run directory with drawn weights."""
    settings = {"model": TINY, "tokens": {"method": "topk", "keep": 0.5, "blocks": [1, 2]}, "engine": {"precision": "float32"}}
    config = images.config(pattern, **settings | {"connections": {"method": "exact", "keep": 0.5}} | more)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved()))
    save_weights(folder / "weights.safetensors", build_model(config).network.state_dict())
    return folder, config


SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 3, 1], "num_heads": [1, 2, 2, 2]}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    images.picture(3, 32, 32).save(path)
    return path


def test_the_survivors_are_the_networks_and_the_rest_fades(tmp_path: Path, photo: Path) -> None:
    run, _ = made(tmp_path / "runs" / "one")
    looked = Viewer(run).look(photo)
    assert [len(ids) for ids in looked.kept.values()] == [8, 4] and set(looked.kept[2]) < set(looked.kept[1])
    assert looked.token in looked.kept[2]
    # exact: ceil(k / 2) keys of each row, and only tokens that are left
    assert [len(ids) for ids in looked.seen.values()] == [4, 2]
    assert all(set(looked.seen[block]) <= set(looked.kept[block]) for block in (1, 2))
    gone = int(np.setdiff1d(looked.kept[1], looked.kept[2])[0])
    assert set(Viewer(run).look(photo, gone).seen) == {1}, "a token that left at block 2 sees nothing there"

    (path,) = show(run, [str(photo)], tmp_path / "out")
    shown = np.asarray(PIL.Image.open(path).convert("RGB")).astype(float)
    assert shown.shape[1] > shown.shape[0] > 500
    quarter = shown[: shown.shape[0] // 2, 2 * shown.shape[1] // 3 :]  # the last panel above: 12 of 16 patches fade
    third = shown[: shown.shape[0] // 2, : shown.shape[1] // 3]
    near = [float((np.abs(part - FADED).max(-1) < 45).mean()) for part in (quarter, third)]
    assert near[0] > near[1] + 0.3, near


def test_classes_have_names_and_the_path_names_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once printed `predicted class 3`: a number, and no truth beside it."""
    names = ["cat", "dog", "hen", "owl"]
    run, _ = made(tmp_path / "runs" / "named")
    (tmp_path / "owl" / "images").mkdir(parents=True)
    images.picture(3, 32, 32).save(tmp_path / "owl" / "images" / "1.png")
    assert Viewer(run).look(tmp_path / "owl" / "images" / "1.png").predicted in "0123", "without a journal"
    (run / "journal.jsonl").write_text(json.dumps({"kind": "start", "time": 1.0, "attempt": 0, "classes": names}) + "\n")
    looked = Viewer(run).look(tmp_path / "owl" / "images" / "1.png")
    assert looked.predicted in names and looked.truth == "owl"
    assert [truth_of(Path(path), names) for path in ("hen/1.png", "dog_7.png", "a/cat/b/c/1.png", "bird.png")] == [
        "hen",
        "dog",
        "",
        "",
    ]
    titles: list[str] = []
    monkeypatch.setattr(
        "trainer.analysis.pictures.kept_tokens._panel", lambda axes, looked, bright, title: titles.append(title)
    )
    draw(looked, tmp_path / "x.png", "x")
    assert titles[0] == f"input, predicted {looked.predicted}, is owl"


def test_shared_keys_are_the_same_for_all_tokens(tmp_path: Path, photo: Path) -> None:
    run, _ = made(tmp_path / "runs" / "two", connections={"method": "shared_keys", "keep": 0.25})
    viewer = Viewer(run)
    first, second = (viewer.look(photo, int(token)).seen[1] for token in viewer.look(photo).kept[1][:2])
    assert len(first) == 2 and first.tolist() == second.tolist()


def test_a_fused_token_is_a_key_like_any(tmp_path: Path, photo: Path) -> None:
    settings = {"tokens": {"method": "topk", "keep": 0.5, "blocks": [1], "fuse": True}}
    run, _ = made(tmp_path / "runs" / "fused", connections={"method": "exact", "keep": 0.88}, **settings)
    looked = Viewer(run).look(photo)
    assert len(looked.kept[1]) == 8 and looked.keys == {1: 9} and len(looked.seen[1]) == 8, "8 of 9 keys: one is hidden"
    (path,) = show(run, [str(photo)], tmp_path / "out")
    assert PIL.Image.open(path).height > 600, "two rows: the second has the keys that the token attends to"


def test_settings_stand_beside_images_in_any_order(tmp_path: Path, photo: Path, capsys: Any) -> None:
    run, _ = made(tmp_path / "runs" / "named")
    odd = photo.rename(tmp_path / "keep=1.png")  # a file is a file, whatever its name
    out = ["--out", str(tmp_path / "out")]
    drawn_as = {}
    for name, words in {
        "own": [str(odd), *out],
        "settings behind": [str(odd), "tokens.keep=0.25", *out],
        "settings first": ["tokens.keep=0.25", *out, str(odd)],
        "image behind an option": [*out, "--token", "5", str(odd), "tokens.keep=0.25"],
        "of another size": [str(odd), "model.image_size=64", *out],
    }.items():
        assert main(["show", str(run), *words]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "keep=1.png")
        drawn_as[name] = (tmp_path / "out" / "keep=1.png").read_bytes()
    assert drawn_as["settings behind"] == drawn_as["settings first"] != drawn_as["own"] != drawn_as["of another size"]
    kept = {keep: Viewer(run, [f"tokens.keep={keep}"]).look(odd).kept for keep in (0.25, 0.5)}
    assert {keep: [len(ids) for ids in blocks.values()] for keep, blocks in kept.items()} == {0.25: [4, 1], 0.5: [8, 4]}
    assert main(["show", str(run), str(odd), "tokens.kep=0.25"]) == 2 and "tokens.kep" in capsys.readouterr().err
    assert (
        main(["show", str(run), "--token", "5", "nowhere.png"]) == 2 and "can't be read as an image" in capsys.readouterr().err
    )


def test_an_image_is_drawn_without_checkpoints_and_shards(tmp_path: Path, photo: Path, capsys: Any) -> None:
    """As on a laptop that has only the weights; `show RUN` without an image, which needs the sheet, is refused."""
    more = {"removed": 0.2, "swap": 0.1, "window": "5ep", "updates": 1, "method": "forgetting"}
    run, _ = made(tmp_path / "runs" / "copied", examples=more)
    assert main(["show", str(run), str(photo), "--out", str(tmp_path / "out")]) == 0
    reported = capsys.readouterr()
    assert reported.out.split() == [str(tmp_path / "out" / "photo.png")] and "no examples.png" in reported.err
    assert main(["show", str(run)]) == 2 and "no checkpoint, which has" in capsys.readouterr().err
    assert main(["show", str(made(tmp_path / "runs" / "plain")[0])]) == 2 and "give an IMAGE" in capsys.readouterr().err


def test_examples_are_ranked_by_forgetting(tmp_path: Path, photo: Path, capsys: Any) -> None:
    pattern = images.write_shards(tmp_path / "shards", [20, 20])
    index = build_index(pattern, progress=False)
    more = {"removed": 0.2, "swap": 0.1, "window": "5ep", "updates": 1, "ties": "id", "method": "forgetting"}
    run, config = made(tmp_path / "runs" / "three", pattern, examples=more)
    level: Any = build_examples(config, index)
    assert ranked(level) == {}, "nothing was presented three times"
    level.seen[:30], level.memory[:30] = 5, 3
    level.memory[7] = 0
    level.events[4], level.events[9] = 3, 1
    rows = {name: ids.tolist() for name, ids in ranked(level).items()}
    assert rows["most forgotten"][:2] == [4, 9] and rows["least forgotten"][:3] == [0, 1, 2] and rows["never right"] == [7]
    state = {"weights": {}, "optimizer": {}, "ema": {}, "selection": None}
    examples = level.state_dict(lambda tensor: tensor)
    save_checkpoint(run / "checkpoints", TrainState(step=9), config, index.fingerprint, examples=examples, **state)
    assert main(["show", str(run), "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "examples.png"
    assert capsys.readouterr().out.strip() == str(path) and PIL.Image.open(path).width > 1000
    named = photo.rename(photo.with_stem("examples"))
    assert main(["show", str(run), str(named), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "examples-0.png"), str(path)]


def test_what_cannot_be_shown_is_reported(tmp_path: Path, photo: Path) -> None:
    run, _ = made(tmp_path / "runs" / "four")
    with pytest.raises(ConfigError, match="--token 16: must be 0 to 15"):
        Viewer(run).look(photo, 16)
    with pytest.raises(ConfigError, match=r"config\.yaml: can't be read as an image"):
        Viewer(run).look(run / "config.yaml")
    off = {"tokens": {"method": "all"}, "connections": {"method": "all"}}
    with pytest.raises(ConfigError, match="every token survives; nothing to show"):
        Viewer(made(tmp_path / "runs" / "five", **off)[0])
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        show(tmp_path, [], tmp_path / "out")
    (run / "weights.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights at"):
        Viewer(run)


def test_tokens_of_a_swin_stage_are_drawn_on_its_grid(tmp_path: Path, photo: Path) -> None:
    model = {"name": "swin_tiny_patch4_window7_224", "classes": 4, "image_size": 32, "args": SWIN}
    tokens = {"method": "topk", "keep": 0.5, "blocks": [2, 3], "position": "block"}
    run, _ = made(tmp_path / "runs" / "swin", model=model, tokens=tokens, connections={"method": "all"})
    looked = Viewer(run).look(photo)
    assert looked.grid == (4, 4) and [len(ids) for ids in looked.kept.values()] == [8, 4]
    assert set(looked.kept[3]) < set(looked.kept[2]) and all(np.array_equal(looked.seen[b], looked.kept[b]) for b in (2, 3))
    (path,) = show(run, [str(photo)], tmp_path / "out")
    assert path.stat().st_size > 1000


def test_a_network_without_tokens_has_nothing_to_show(tmp_path: Path) -> None:
    model = {"name": "resnet18", "classes": 4, "image_size": 32, "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}
    run, _ = made(tmp_path / "runs" / "resnet", model=model, tokens={"method": "all"}, connections={"method": "all"})
    with pytest.raises(ConfigError, match="nothing to show"):
        Viewer(run)
