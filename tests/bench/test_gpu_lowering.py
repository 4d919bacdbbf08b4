"""Device code without a device: what inductor writes for an H200 compiles for sm_90, and its keyed draws are those of eager.

Was found this way: multiples of an arange by a 64-bit factor, which Triton refuses, so that every compiled recipe with drop path would have
ended at its first step on a GPU; on a CPU inductor writes C++, which takes them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._triton import has_triton

from sparsity import keyed_random
from sparsity.build import build
from sparsity.connections import CONNECTIONS
from sparsity.tokens import TOKENS
from sparsity.tokens.topk import RandomSettings, TopKSettings
from sparsity.types import Plan
from tests.conftest import ROOT, environment
from tests.support.networks import SIZE, swin
from tests.support.networks import network as made
from tests.support.triton_interpreter import ROWS
from tests.support.vits import images, tiny
from trainer.bench.gpu import lowering, pretended

OUTPUTS = frozenset({"kept", "cls_attention"})
MECHANISMS: dict[str, dict[str, Any]] = {
    **{f"tokens={name}": {"tokens": name} for name in TOKENS},
    **{f"connections={name}": {"tokens": "topk", "connections": name} for name in CONNECTIONS},
    "topk, fused": {"tokens": TopKSettings(fuse=True), "connections": "shared_keys"},
    "random, fused": {"tokens": RandomSettings(fuse=True), "connections": "exact"},
    "patch drop": {"tokens": "topk", "patch_drop": 0.5},
}


@pytest.fixture
def h200() -> Iterator[None]:
    with pretended.h200():
        yield


def compile_all(graphs: list[lowering.Lowered]) -> int:
    """Every kernel for sm_90; how many there were."""
    sources = {name: source for graph in graphs for name, source in graph.code.items()}
    refused = {}
    for name, source in sources.items():
        try:
            lowering.compile_kernel(name, source)
        except Exception as error:
            refused[name] = str(error)[-400:]
    assert not refused
    return len(sources)


def test_keyed_draws_and_choices_compile_for_a_gpu(h200: None) -> None:
    for what, (function, inputs) in ROWS.items():
        assert compile_all(lowering.lower(function, *inputs, backward=False, autocast=False)) >= 1, what


def test_a_kernel_that_triton_refuses_is_found(h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draws as they were: without them being data, the counter is index arithmetic in int32."""
    monkeypatch.setattr(keyed_random, "_spread", lambda counters: counters * keyed_random._signed(keyed_random._GAMMA))
    graphs = lowering.lower(lambda keys: keyed_random.uniform(keys, 1, shape=(3,)), torch.arange(4), backward=False)
    with pytest.raises(AssertionError, match="out of range for type int32"):
        compile_all(graphs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a device for Triton")
def test_torchs_answer_that_there_is_no_triton_is_not_kept() -> None:
    """torch asks once per process: a compilation for the CPU before would be remembered in the block, the H200 of the block behind it."""
    assert not has_triton()
    with pretended.h200():
        assert has_triton()
    assert not has_triton()


def test_the_machine_is_as_before() -> None:
    before = torch.nn.functional.scaled_dot_product_attention, torch.cuda.get_device_capability, torch.cuda.current_device
    with pretended.h200():
        assert torch.cuda.get_device_capability() == (9, 0)
    after = torch.nn.functional.scaled_dot_product_attention, torch.cuda.get_device_capability, torch.cuda.current_device
    assert before == after and not torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_compiles_for_a_gpu_forward_and_backward(name: str, h200: None) -> None:
    """In bf16 autocast, with drop path; random numbers keyed by image."""
    settings = dict(MECHANISMS[name])
    vit = tiny(depth=2, drop_path_rate=0.5, patch_drop_rate=settings.pop("patch_drop", 0.0)).train()
    network, keys = build(vit, blocks=(0,), **settings), torch.arange(4)

    def step(pixels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return network(pixels, Plan(0.6, 0.5), OUTPUTS, keys).logits

    graphs = lowering.lower(step, images(vit, 4), keys)
    assert [graph.backward for graph in graphs] == [False, True]
    assert compile_all(graphs) > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("version", "tokens"), [(1, "topk"), (2, "topk")])
def test_a_swin_that_leaves_tokens_out_compiles_for_a_gpu_forward_and_backward(version: int, tokens: str, h200: None) -> None:
    """As above. 20 pixels: windows of 4 x 4 do not divide the grid of 10 x 10, so there is padding too."""
    net = swin(20, version, depths=(3,), num_heads=(2,), drop_path_rate=0.5).train()
    network, keys = build(net, tokens=tokens, blocks=(0, 1), position="block"), torch.arange(4)

    def step(pixels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return network(pixels, Plan(0.6), OUTPUTS, keys).logits

    graphs = lowering.lower(step, torch.randn(4, 3, 20, 20), keys)
    assert [graph.backward for graph in graphs] == [False, True]
    assert compile_all(graphs) > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_a_network_without_tokens_compiles_for_a_gpu_forward_and_backward(kind: str, h200: None) -> None:
    network = build(made(kind, drop_path=0.5).train(), image_size=SIZE)

    def step(pixels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return network(pixels, rng_keys=keys).logits

    graphs = lowering.lower(step, torch.randn(4, 3, SIZE, SIZE), torch.arange(4))
    assert [graph.backward for graph in graphs] == [False, True]
    assert compile_all(graphs) > 10


@pytest.mark.slow
def test_in_tritons_interpreter_draws_and_choices_are_those_of_eager_to_the_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_interpreter"],
        env=environment(TRITON_INTERPRET="1"), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == ROWS.keys()
    assert {what: sum(differ) for what, differ in found.items()} == dict.fromkeys(ROWS, 0)
