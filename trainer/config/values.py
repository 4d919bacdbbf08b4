"""Types of configuration values: durations with a unit, shares with bounds, block numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)


class Duration(BaseModel):
    """A length of training: `5ep` (epochs, may be fractional) or `500step` (optimizer steps)."""

    model_config = ConfigDict(frozen=True)
    count: float
    unit: Literal["ep", "step"]

    def __str__(self) -> str:
        return f"{_exact(self.count)}{self.unit}"


def _exact(count: float) -> str:
    """The shortest text that parses to the same number; `:g` alone rounds to six digits, and a run of 1,234,567 steps has seven."""
    return f"{count:g}" if float(f"{count:g}") == count else repr(count).removesuffix(".0")


def _parse_duration(value: Any) -> Any:
    if isinstance(value, Duration):
        return value
    text = str(value).strip()
    for unit in ("step", "ep"):
        number = text.removesuffix(unit)
        if number != text:
            try:
                count = float(number)
            except ValueError:
                break
            if not 0 <= count < float("inf") or (unit == "step" and count != int(count)):
                break
            return Duration(count=count, unit=unit)
    raise ValueError(f"{value!r} is not a duration; write epochs as '5ep' or optimizer steps as '500step'")


def _epochs_only(value: Duration) -> float:
    if value.unit != "ep":
        raise ValueError(f"'{value}' is in steps; schedules follow progress, write it in epochs, e.g. '5ep'")
    return value.count


@dataclass(frozen=True)
class Unit:
    """A mark of a type, for `reference`: the unit in which values are written."""

    name: str


_as_text = PlainSerializer(str, return_type=str)
Length = Annotated[Duration, BeforeValidator(_parse_duration), _as_text]
Epochs = Annotated[
    float,
    Unit("epochs"),
    BeforeValidator(lambda v: _epochs_only(_parse_duration(v))),
    PlainSerializer(lambda v: f"{_exact(v)}ep", return_type=str),
]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]  # a share that is removed, so never all
Chance = Annotated[float, Field(ge=0.0, le=1.0)]


def _no_duplicates(blocks: tuple[int, ...]) -> tuple[int, ...]:
    if list(blocks) != sorted(set(blocks)) or any(b < 0 for b in blocks):
        raise ValueError(f"{list(blocks)}: must be block numbers >= 0, unique, in ascending order")
    return blocks


Blocks = Annotated[tuple[int, ...], AfterValidator(_no_duplicates)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # a docstring under a field is its description, see `reference`
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1: `epochs: true` would be one epoch."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and field.annotation in (int, float):
            raise ValueError(f"must be a number, got {str(value).lower()}")
        return value
