"""What to do about an error of a tracking server."""

from __future__ import annotations

import pytest

from trainer.tracking import mlflow_client
from trainer.tracking.mlflow_client import hint


class Answer(Exception):
    """As MLflow's RestException: a text, and the status apart."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status

    def get_http_status_code(self) -> int:
        return self.status


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (Answer("no", 401), True),
        (Answer("no", 403), True),
        (Answer("no", 402), False),
        (Answer("no", 500), False),
        (OSError("API request failed with 401"), True),
        (OSError("Forbidden"), True),
        (OSError("run 40100 is gone"), False),
        (OSError("x" * 300 + "401"), False),
    ],
)
def test_a_server_that_wants_a_password_is_recognised_by_status_or_text(error: Exception, refused: bool) -> None:
    assert hint(error) == (f"; {mlflow_client.REMEDY}" if refused else "")


def test_an_answer_that_does_not_fit_into_memory_asks_for_the_address() -> None:
    wrapped = OSError("failed")
    wrapped.__context__ = MemoryError()
    for error in (MemoryError(), wrapped):
        assert hint(error).endswith("is this the address of an MLflow server?")
