"""Losses against timm's, and the observations that level 1 learns from, against a table made by hand and a slow reference."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from sparsity.examples.observations import Observations
from sparsity.types import ModelOutput, single_process
from trainer.config.errors import ConfigError
from trainer.data.augment.mixup import NO_MIX, Mix
from trainer.model.objective import Objective

C = 5


def objective(loss="soft", smoothing=0.0, rule="dominant"):
    return Objective(C, loss, smoothing=smoothing, rule=rule)


def batch(labels, ids=None, copies=None, weights=None):
    """The fields of a Batch that the objective reads."""
    n = len(labels)
    return SimpleNamespace(
        labels=torch.tensor(labels),
        ids=torch.tensor(ids if ids is not None else list(range(100, 100 + n))),
        copies=torch.tensor(copies or [0] * n),
        weights=torch.tensor(weights or [1.0] * n),
    )


def predicting(*classes):
    """Logits (b, C) whose order of preference per row is given, e.g. (2, 0) prefers class 2, then class 0."""
    logits = torch.zeros(len(classes), C)
    for row, order in enumerate(classes):
        for rank, c in enumerate(order if isinstance(order, tuple) else (order,)):
            logits[row, c] = 9.0 - rank
    return ModelOutput(logits)


def credited(rule, rows, record, mix):
    """{id: right} of the valid observations; fails where an id is observed twice."""
    ids, outcome = objective(rule=rule).credit(rows, record, torch.arange(len(rows.ids)).float(), mix)
    valid = ids[outcome.valid].tolist()
    assert len(valid) == len(set(valid)), "an image was observed twice"
    return dict(zip(valid, outcome.correct[outcome.valid].tolist(), strict=True))


# -- losses ------------------------------------------------------------------------------------------------------------


def test_soft_cross_entropy_is_timms_to_the_bit_gradient_included():
    ours, theirs = torch.randn(8, C, requires_grad=True), torch.randn(8, C)
    theirs = ours.detach().clone().requires_grad_()
    target = objective(smoothing=0.1)
    targets = target.targets(torch.arange(8) % C, Mix(0.3), torch.ones(8))
    loss = target.losses(ours, targets).sum() / 8
    expected = SoftTargetCrossEntropy()(theirs, targets)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_without_mixing_smoothed_targets_give_timms_label_smoothing():
    logits, labels, target = torch.randn(8, C), torch.arange(8) % C, objective(smoothing=0.1)
    losses = target.losses(logits, target.targets(labels, NO_MIX, torch.ones(8)))
    torch.testing.assert_close(losses.mean(), LabelSmoothingCrossEntropy(0.1)(logits, labels))


@pytest.mark.parametrize("lam", [1.0, 0.999, 0.4])
def test_binary_cross_entropy_is_that_of_deit3(lam):
    logits, labels, target = torch.randn(8, C, requires_grad=True), torch.tensor([0, 1, 2, 2, 4, 0, 1, 3]), objective("bce")
    losses = target.losses(logits, target.targets(labels, Mix(lam), torch.ones(8)))
    order = torch.tensor([0, 2, 4, 6, 7, 5, 3, 1])  # neighbours as timm's flip partners
    soft = mixup_target(labels[order], C, lam, 0.0)
    expected = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(logits[order], soft)
    torch.testing.assert_close(losses.mean(), expected)
    (ours,) = torch.autograd.grad(losses.mean(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs)


def test_losses_are_float32_per_row_under_half_precision_logits():
    for loss in ("soft", "bce"):
        target = objective(loss)
        losses = target.losses(torch.randn(4, C).bfloat16(), target.targets(torch.arange(4), NO_MIX, torch.ones(4)))
        assert losses.dtype == torch.float32 and losses.shape == (4,)


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match=r"augment.smoothing=0\.1.*set augment.smoothing=0"):
        objective("bce", smoothing=0.1)


# -- observations ------------------------------------------------------------------------------------------------------


def test_unmixed_rows_are_judged_alone_under_every_rule():
    for rule in ("clear", "dominant", "without_partner", "authors"):
        assert credited(rule, batch([0, 1, 2, 3]), predicting(0, 2, 2, 3), NO_MIX) == {
            100: True,
            101: False,
            102: True,
            103: True,
        }


def test_dominant_credits_the_image_that_dominates():
    rows = batch([0, 1])
    # own share .7: row 0 is mostly image 100
    assert credited("dominant", rows, predicting(0, 0), Mix(0.7)) == {100: True, 101: False}
    # own share .3: row 0 is mostly image 101 with label 1, row 1 mostly image 100 with label 0
    assert credited("dominant", rows, predicting(1, 4), Mix(0.3)) == {101: True, 100: False}
    assert credited("dominant", rows, predicting(0, 1), Mix(0.3)) == {101: False, 100: False}


def test_half_and_half_gives_each_image_its_own_row():
    assert credited("dominant", batch([3, 1]), predicting(3, 1), Mix(0.5)) == {100: True, 101: True}


def test_without_partner_forgives_the_other_class_only():
    rows = batch([0, 1])
    assert credited("without_partner", rows, predicting((1, 0), (2, 1)), Mix(0.7)) == {100: True, 101: False}
    assert credited("without_partner", rows, predicting((0, 1), (1, 0)), Mix(0.3)) == {101: True, 100: True}
    same = batch([2, 2])  # nothing to leave out where both are of one class
    assert credited("without_partner", same, predicting(2, 0), Mix(0.7)) == {100: True, 101: False}


def test_the_authors_rule_compares_every_row_with_its_own_label():
    assert credited("authors", batch([0, 1]), predicting(1, 0), Mix(0.1)) == {100: False, 101: False}


def test_broken_images_are_not_observed_and_leave_their_partner_its_row():
    rows = batch([0, 1, 2, 3], weights=[0.0, 1.0, 1.0, 0.5])
    for rule in ("dominant", "without_partner"):
        assert credited(rule, rows, predicting(1, 1, 3, 4), Mix(0.2)) == {101: True, 103: True, 102: False}
    # unmixed because the partner is broken, so class 0 is not left out for image 101
    assert credited("without_partner", rows, predicting(0, (0, 1), 3, 3), Mix(0.8))[101] is False


def test_a_loss_that_is_not_finite_gives_no_observation():
    losses = torch.tensor([1.0, float("nan"), float("inf"), 0.5])
    for mix in (NO_MIX, Mix(0.9)):
        ids, observation = objective().credit(batch([0, 1, 2, 3]), predicting(0, 1, 2, 3), losses, mix)
        assert ids[observation.valid].tolist() == [100, 103]


def test_copies_of_one_image_count_once_by_copy_index():
    rows = batch([0, 1, 0, 2], ids=[7, 8, 7, 9], copies=[1, 0, 0, 0])
    assert credited("dominant", rows, predicting(0, 1, 0, 2), Mix(0.9)) == {8: True, 7: True, 9: True}
    swapped = credited("dominant", rows, predicting(1, 4, 2, 3), Mix(0.1))
    assert swapped == {8: True, 9: True, 7: False}  # copy 0 of image 7 speaks from its partner's row, copy 1 is silent


def reference(rule, labels, ids, copies, weights, logits, lam):
    """The rules once more, one pair and one row at a time."""
    seen = {}
    for a, b in [(r, r ^ 1) for r in range(len(labels))]:
        if weights[a] == 0:
            continue
        share = lam if weights[b] > 0 else 1.0
        who, other = (a, b) if rule == "authors" or share >= 0.5 else (b, a)
        scores = list(logits[a])
        if rule == "without_partner" and share < 1 and labels[other] != labels[who]:
            scores[labels[other]] = float("-inf")
        if copies[who] == 0:
            assert ids[who] not in seen
            seen[ids[who]] = max(range(C), key=scores.__getitem__) == labels[who]
    return seen


@pytest.mark.parametrize("rule", ["dominant", "without_partner", "authors"])
def test_rules_agree_with_a_slow_reference(rule):
    generator = torch.Generator().manual_seed(5)
    for lam, _ in itertools.product([1.0, 0.9, 0.5, 0.4999, 0.01, 0.0], range(10)):
        labels = torch.randint(0, C, (12,), generator=generator).tolist()
        weights = (torch.rand(12, generator=generator) > 0.2).float().tolist()
        copies = (torch.rand(12, generator=generator) > 0.8).long().tolist()
        logits = torch.randn(12, C, generator=generator)
        rows = batch(labels, copies=copies, weights=weights)
        expected = reference(rule, labels, rows.ids.tolist(), copies, weights, logits.tolist(), lam)
        assert credited(rule, rows, ModelOutput(logits), Mix(lam)) == expected


def test_dominant_is_the_argmax_of_the_soft_target():
    labels, weights = torch.tensor([3, 1, 0, 0, 4, 2]), torch.ones(6)
    for lam in (0.9, 0.51, 0.49, 0.1):
        target = objective(smoothing=0.1)
        top = target.targets(labels, Mix(lam), weights).argmax(-1)
        assert all(credited("dominant", batch(labels.tolist()), predicting(*top.tolist()), Mix(lam)).values())


def test_spread_compares_across_token_counts_and_losses_pass_through():
    attention = torch.softmax(torch.randn(2, 16), -1)
    doubled = attention.repeat_interleave(2, 1) / 2  # the same map on twice as many tokens
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    for rule in ("dominant", "authors"):
        target, rows = objective(rule=rule), batch([0, 1])
        outcomes = [
            target.credit(rows, ModelOutput(torch.zeros(2, C), a), losses, NO_MIX)[1] for a in (attention, doubled, None)
        ]
        torch.testing.assert_close(outcomes[0].spread, outcomes[1].spread)
        assert (outcomes[0].spread > 0).all() and outcomes[2].spread.tolist() == [0.0, 0.0]
        assert outcomes[0].loss.tolist() == [1.0, 2.0] and not outcomes[0].loss.requires_grad
        assert outcomes[0].spread.dtype == outcomes[0].loss.dtype == torch.float32


def test_clear_counts_where_one_image_dominates_and_spares_the_loss():
    """Between 1/4 and 3/4 a row gives no observation; an unmixed row (broken partner) always does; losses count everywhere."""
    rows, record = batch([0, 1, 2, 3], weights=[0.0, 1.0, 1.0, 1.0]), predicting((1, 0), 1, (3, 2), 3)
    losses = torch.arange(4).float()
    for lam, clear in ((0.9, True), (0.75, True), (0.6, False), (0.3, False), (0.1, True)):
        ids, ours = objective(rule="clear").credit(rows, record, losses, Mix(lam))
        same_ids, without = objective(rule="without_partner").credit(rows, record, losses, Mix(lam))
        assert (
            torch.equal(ids, same_ids) and torch.equal(ours.correct, without.correct) and torch.equal(ours.valid, without.valid)
        )
        assert (ours.clear is None) == clear and (clear or ours.clear.tolist() == [True, True, False, False])
        for value, seen in (("loss", [1, 2, 3]), (None, [1, 2, 3] if clear else [1])):
            slate = Observations(200, value)
            slate.record(ids, ours)
            assert [i - 100 for i in slate.gather(single_process).ids.tolist()] == seen
