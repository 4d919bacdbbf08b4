"""What attention does otherwise under torch.compile: the gradient of the gather of tokens, and the products of one query."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from sparsity.attention import gather_tokens
from sparsity.build import build
from sparsity.tokens.scores import attention_rows
from sparsity.types import QKV, Plan, Tokens
from tests.support.vits import images, tiny

ROWS, LENGTH, KEPT = 5, 11, 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def watched(graphs: list[Any]) -> Any:
    """A backend that runs the graphs as they are and keeps them, forward and backward."""

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def operations(graphs: list[Any]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.graph.nodes}


def gradient(function: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs[0].clone().requires_grad_()
    result = function(leaf, *inputs[1:])
    result.backward(torch.randn(result.shape, generator=torch.Generator().manual_seed(1)))
    assert leaf.grad is not None
    return result.detach(), leaf.grad


@pytest.mark.parametrize(("shape", "dim"), [((ROWS, LENGTH, 3), 1), ((ROWS, 2, LENGTH, 3), 2)])
def test_the_compiled_gradient_of_a_gather_is_torchs_to_the_bit_without_additions(shape: tuple[int, ...], dim: int) -> None:
    index = torch.stack([torch.randperm(LENGTH)[:KEPT] for _ in range(ROWS)])
    graphs: list[Any] = []
    plain = partial(gather_tokens, dim=dim)
    compiled, x = torch.compile(plain, backend=watched(graphs), fullgraph=True), torch.randn(shape)
    for one, other in zip(gradient(plain, x, index), gradient(compiled, x, index), strict=True):
        assert torch.equal(one, other) and one.count_nonzero() > 0
    assert len(graphs) == 2 and "aten.gather.default" in operations(graphs)
    assert not {name for name in operations(graphs) if "scatter_add" in name}


def test_one_query_is_multiplied_without_a_product_of_matrices_and_within_rounding() -> None:
    q, k = (torch.randn(ROWS, 3, LENGTH, 8) for _ in range(2))
    tokens = Tokens(torch.zeros(ROWS, LENGTH, 24), torch.arange(LENGTH - 1).expand(ROWS, -1), 1)

    def row(q: Tensor, k: Tensor, queries: int) -> Tensor:
        return attention_rows(tokens, QKV(q, k, k, 0.35), queries)

    graphs: list[Any] = []
    compiled = torch.compile(row, backend=watched(graphs), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, 1), row(q, k, 1), rtol=0, atol=1e-6)
    assert not {"aten.bmm.default", "aten.mm.default"} & operations(graphs)
    assert torch.equal(compiled(q, k, 2), row(q, k, 2)) and "aten.bmm.default" in operations(graphs)


def test_ddp_splits_a_compiled_graph_with_a_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the borders of its buckets, which are made small here."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 4096)
    vit = tiny(drop_path_rate=0.0).train()
    model, x = build(vit, tokens="topk", connections="shared_keys", blocks=(0,)), images(vit, 4)
    plain = [
        one.clone() for one in torch.autograd.grad(model(x, Plan(0.6, 0.5)).logits.square().sum(), list(model.parameters()))
    ]
    own = not dist.is_initialized()  # else a run in this process has left its group of one rank
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        graphs: list[Any] = []
        model.kernels = {(17, False): "math"}
        model.compile(backend=watched(graphs))
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.005)
        wrapped(x, Plan(0.6, 0.5)).logits.square().sum().backward()
    finally:
        if own:
            dist.destroy_process_group()
    assert len(graphs) > 4, "more than one part, each forward and backward"
    assert not {name for name in operations(graphs) if "scatter_add" in name}
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)
