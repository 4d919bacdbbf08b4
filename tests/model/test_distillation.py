"""Losses between network and teacher: against DeiT's code and torch's own KL, and where their gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled

from sparsity.build import build
from sparsity.types import DENSE, ModelOutput, Plan
from sparsity.vit import SparseViT
from tests.support.vits import images, tiny
from trainer.model.build import build_model
from trainer.model.distillation import Distillation, hard, soft, tokens
from trainer.model.objective import Objective

C = 5


def pair(rows: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = 3 * torch.randn(2, rows, C, generator=generator)
    return ours.requires_grad_(), theirs


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_torchs_kl_with_temperature_gradient_included(tau: float):
    ours, theirs = pair()
    loss = soft(ours, theirs, tau)
    log_ours, log_theirs = (F.log_softmax(one / tau, dim=1) for one in (ours, theirs))
    expected = (
        F.kl_div(log_ours, log_theirs, reduction="none", log_target=True).sum(dim=1) * tau * tau
    )  # DeiT's code divides by C too
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one.sum(), ours, retain_graph=True)[0] for one in (loss, expected)))
    assert soft(theirs, theirs, tau).abs().max() < 1e-6 and (loss > 0).all()


def test_hard_distillation_is_the_cross_entropy_of_the_teachers_prediction():
    ours, theirs = pair()
    torch.testing.assert_close(hard(ours, theirs), F.cross_entropy(ours, theirs.argmax(dim=1), reduction="none"))


def test_token_distillation_by_hand():
    """T = (.5, .5, 0) after renormalising, TIS = (.25, .5, .25): KL = .5 ln 2."""
    attention, importance = torch.tensor([[0.3, 0.3, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    torch.testing.assert_close(tokens(importance, attention), torch.tensor([0.5]) * torch.log(torch.tensor(2.0)))
    torch.testing.assert_close(tokens(importance, 7 * importance), torch.zeros(1))


def test_token_distillation_is_finite_for_weights_that_underflow():
    importance = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    loss = tokens(importance, torch.tensor([[0.0, 1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), importance)
    assert loss.isfinite().all() and loss > 80 and gradient.isfinite().all()


def test_losses_are_float32_from_half_precision():
    ours, theirs = (one.detach().bfloat16() for one in pair())
    rows = torch.softmax(ours, dim=1), torch.softmax(theirs, dim=1)
    for loss in (soft(ours, theirs, 2.0), hard(ours, theirs), tokens(*rows)):
        assert loss.dtype == torch.float32 and loss.shape == (8,)


def test_the_parts_add_up_with_their_weights():
    ours, theirs = pair()
    labels, rows = torch.rand(8), torch.softmax(ours.detach(), dim=1)
    output, taught = ModelOutput(ours, importance=rows), ModelOutput(theirs, cls_attention=torch.softmax(theirs, dim=1))
    distil = Distillation(logits="soft", tau=2.0, alpha=0.3, tokens=1.5, block=1)
    loss, parts = distil(labels, output, taught)
    torch.testing.assert_close(loss, 0.7 * labels + 0.3 * parts["logits"] + 1.5 * parts["tokens"])
    assert tuple(parts) == distil.parts == ("labels", "logits", "tokens") and torch.equal(parts["labels"], labels)
    assert not any(part.requires_grad for part in parts.values()) and loss.requires_grad
    assert distil.outputs == {"importance:1"} and distil.teacher_outputs == {"cls_attention"}


def test_without_a_teacher_it_is_the_identity():
    labels, nothing = torch.rand(8), Distillation()
    loss, parts = nothing(labels, ModelOutput(pair()[0]), None)
    assert loss is labels and not parts and not nothing.parts and not nothing.outputs and not nothing.teacher_outputs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_tokens_reaches_the_blocks_up_to_its_own_and_nothing_behind(checkpointing: bool):
    """P = 1 of three blocks: of block 1 norm and queries and keys, not its values, projection and MLP; nothing of block 2 and the head."""
    torch.manual_seed(0)
    vit, teacher = tiny(), SparseViT(tiny()).requires_grad_(False).eval()
    vit.set_grad_checkpointing(checkpointing)
    model, distil = build(vit, tokens="topk", blocks=(1,), position="block").train(), Distillation(tokens=1.0, block=1)
    output = model(images(vit), Plan(0.5), distil.outputs)
    loss, _ = distil(torch.zeros(len(output.logits)), output, teacher(images(vit), DENSE, distil.teacher_outputs))
    loss.sum().backward()
    got = {name for name, parameter in vit.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    first = {
        name for name, _ in vit.named_parameters() if name.startswith(("blocks.0.", "patch_embed.", "cls_token", "pos_embed"))
    }
    own = {f"blocks.1.{name}" for name in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias")}
    assert got == first | own
    values = vit.blocks[1].attn.qkv.weight.grad[48:]  # rows: queries, keys, values of width 24
    assert not values.abs().sum() and vit.blocks[1].attn.qkv.weight.grad[:24].abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    vit, teacher = tiny(drop_path_rate=0.0).double(), SparseViT(tiny().double()).requires_grad_(False).eval()
    model, objective = build(vit, tokens="topk", blocks=(1,)).train(), Objective(C)
    distil = Distillation(logits="soft", tau=2.0, alpha=0.4, tokens=1.0, block=1)
    pixels, labels = images(vit, 8).double(), torch.arange(8) % C
    weights = torch.tensor([1.0, 1, 0, 1, 0.5, 1, 1, 1])
    targets = F.one_hot(labels, C).float()

    def gradient(size: int) -> list[torch.Tensor]:
        vit.zero_grad()
        for start in range(0, 8, size):
            rows = slice(start, start + size)
            output = model(pixels[rows], Plan(0.5), distil.outputs)
            with torch.no_grad():
                taught = teacher(pixels[rows], DENSE, distil.teacher_outputs)
            losses, _ = distil(objective.losses(output.logits, targets[rows]), output, taught)
            ((losses * weights[rows]).sum() / weights.sum()).backward()
        return [parameter.grad.clone() for parameter in vit.parameters()]

    for whole, parts in zip(gradient(8), gradient(2), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_distillation_token_learns_from_the_teacher_and_the_class_token_from_the_labels():
    torch.manual_seed(0)
    vit = tiny(VisionTransformerDistilled)
    vit.set_distilled_training(True)
    model, objective = build(vit).train(), Objective(C)
    output, taught = model(images(vit, 8)), ModelOutput(pair()[1])
    targets = F.one_hot(torch.arange(8) % C, C).float()
    labels = objective.losses(output.logits, targets)
    torch.testing.assert_close(labels, F.cross_entropy(output.logits[0], targets, reduction="none"))
    _, parts = Distillation(logits="hard")(labels, output, taught)
    torch.testing.assert_close(parts["logits"], hard(output.logits[1].detach(), taught.logits))


def test_training_accuracy_of_a_pair_is_that_of_its_mean_as_in_evaluation():
    from tests.model.test_objective import NO_MIX, batch

    first, second = torch.zeros(2, C), torch.zeros(2, C)
    first[:, 0], second[:, 1] = 1.0, torch.tensor([3.0, 0.5])
    rows = batch([1, 0])
    _, observation = Objective(C).credit(rows, ModelOutput((first, second)), torch.zeros(2), NO_MIX)
    assert observation.correct.tolist() == [True, True]


@pytest.mark.parametrize(("logits", "both"), [("none", False), ("hard", True)])
def test_a_model_with_a_distillation_token_returns_its_two_logits_only_for_a_teacher_of_logits(logits: str, both: bool):
    from tests.support import images as drawn

    small = {"name": "deit_tiny_distilled_patch16_224", "classes": 4, "image_size": 16}
    small["args"] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    teacher = {} if logits == "none" else {"from": "timm", "logits": logits}
    model = build_model(drawn.config("nowhere", model=small, teacher=teacher))
    assert isinstance(model.train()(torch.zeros(2, 3, 16, 16)).logits, tuple) == both
    assert isinstance(model.eval()(torch.zeros(2, 3, 16, 16)).logits, torch.Tensor)
