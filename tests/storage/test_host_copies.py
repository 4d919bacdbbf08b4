"""Copies in host memory: their values, and that the memory is used again."""

from __future__ import annotations

import torch

from trainer.storage.host_copies import HostCopies


def test_a_copy_has_the_values_and_follows_no_later_change() -> None:
    copies, value = HostCopies(), torch.arange(6.0).view(2, 3).requires_grad_()
    copied = copies("a", value)
    copies.wait()
    with torch.no_grad():
        value.zero_()
    assert copied.equal(torch.arange(6.0).view(2, 3)) and not copied.requires_grad


def test_the_memory_of_a_name_is_used_again_while_its_shape_stays() -> None:
    copies = HostCopies()
    first = copies("a", torch.zeros(4, 4))
    again, other = copies("a", torch.ones(4, 4)), copies("b", torch.ones(4, 4))
    assert again.data_ptr() == first.data_ptr() != other.data_ptr()
    assert copies("a", torch.ones(5)).shape == (5,)


def test_a_copy_takes_the_type_that_is_asked_for() -> None:
    copies = HostCopies()
    assert copies("a", torch.ones(2, dtype=torch.bfloat16), torch.float32).dtype == torch.float32
    assert copies("n", torch.tensor(3)).dtype == torch.int64 and int(copies("n", torch.tensor(4))) == 4
