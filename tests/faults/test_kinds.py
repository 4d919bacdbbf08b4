"""Every kind of fault has a test in `make test`, and the page lists them as they are."""

from __future__ import annotations

import pytest

from tests.faults.kinds import KINDS, ROOT, is_slow, page


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_has_a_test_in_make_test(kind) -> None:
    assert not all(is_slow(test) for test in kind.tests)


def test_the_page_is_what_the_command_prints() -> None:
    assert page() == (ROOT / "docs" / "results" / "reliability.md").read_text()


def test_a_test_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(ValueError, match="no test test_nothing"):
        is_slow("faults/test_kinds.py::test_nothing")
