"""Types of configuration values: durations with a unit, shares with bounds, block numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

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

FINEST = 10**6  # positions are fractions of an epoch with at most as many steps
# `float` alone takes digits of other scripts, 1_0 and nan
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


class Duration(BaseModel):
    """A length of training: `5ep` (epochs, may be fractional) or `500step` (optimizer steps)."""

    model_config = ConfigDict(frozen=True)
    count: float
    unit: Literal["ep", "step"]

    def __str__(self) -> str:
        return f"{_exact(self.count)}{self.unit}"

    @property
    def exact(self) -> Fraction:
        """The count as it is written: 0.1 is 1/10, of which .3 has three; as floats, .3 // .1 is 2."""
        return Fraction(repr(self.count))

    def multiples(self, position: Fraction | float) -> int:
        """How many whole multiples of this length, which is not 0, lie up to a position in its unit."""
        return int(Fraction(position).limit_denominator(FINEST) // self.exact)


def _exact(count: float) -> str:
    """The shortest text that parses to the same number; `:g` alone rounds to six digits, and a run of 1,234,567 steps has seven."""
    return f"{count:g}" if float(f"{count:g}") == count else repr(count).removesuffix(".0")


def parse_duration(value: Any) -> Duration:
    """A duration from its text. Raises ValueError."""
    if isinstance(value, Duration):
        return value
    text = str(value).strip()
    for unit in ("step", "ep"):
        number = text.removesuffix(unit)
        if number != text:
            if not _NUMBER.fullmatch(number):
                break
            count = float(number)
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
Length = Annotated[Duration, BeforeValidator(parse_duration), _as_text]
Epochs = Annotated[
    float,
    Unit("epochs"),
    BeforeValidator(lambda v: _epochs_only(parse_duration(v))),
    PlainSerializer(lambda v: f"{_exact(v)}ep", return_type=str),
]
Keep = Annotated[float, Field(gt=0.0, le=1.0)]  # a share that is kept
Share = Annotated[float, Field(ge=0.0, lt=1.0)]  # a share that is removed, so never all
Chance = Annotated[float, Field(ge=0.0, le=1.0)]


def _no_duplicates(blocks: tuple[int, ...]) -> tuple[int, ...]:
    if list(blocks) != sorted(set(blocks)) or any(b < 0 for b in blocks):
        raise ValueError(f"{list(blocks)}: must be block numbers >= 0, unique, in ascending order")
    return blocks


Blocks = Annotated[tuple[int, ...], AfterValidator(_no_duplicates)]


def _each_once(keeps: tuple[float, ...]) -> tuple[float, ...]:
    if twice := [keep for at, keep in enumerate(keeps) if keep in keeps[:at]]:
        raise ValueError(f"{list(keeps)}: {twice[0]:g} is given twice; name each keep ratio once")
    return keeps


KeepRatios = Annotated[tuple[Keep, ...], AfterValidator(_each_once)]


def _blocks_or_patterns(value: Any) -> Any:
    blocks = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if blocks or (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)):
        return value
    raise ValueError(
        'must be a number of first blocks (an integer >= 0) or a list of patterns, e.g. [pos_embed, "blocks.[0-5].*"]'
    )


Frozen = Annotated[int | tuple[str, ...], BeforeValidator(_blocks_or_patterns)]  # parameters that do not train


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
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        if field is not None and not any(isinstance(mark, Unit) for mark in field.metadata):  # a duration is text
            _refuse_lookalikes(field.annotation, value)
        return value


def _refuse_lookalikes(kind: Any, value: Any) -> None:
    """Raises ValueError for true and for text where `kind` is a number or holds numbers: pydantic takes true for 1 and '1_28' for 128."""
    if kind in (int, float):
        noun = "a number" if kind is float else "an integer"
        if isinstance(value, bool):
            raise ValueError(f"must be a number, got {str(value).lower()}")
        if isinstance(value, str) and _is_taken(value):
            raise ValueError(f"must be {noun}, got the text {value!r:.80}; write it in digits 0 to 9, without quotes")
    elif get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            _refuse_lookalikes(part, value)
    elif get_origin(kind) is Annotated and not any(isinstance(mark, Unit) for mark in get_args(kind)):
        _refuse_lookalikes(get_args(kind)[0], value)
    elif get_origin(kind) is tuple and isinstance(value, list | tuple):
        parts = get_args(kind)
        for part, one in zip(repeat(parts[0]) if parts[-1] is Ellipsis else parts, value, strict=False):
            _refuse_lookalikes(part, one)


def _is_taken(text: str) -> bool:
    """Whether Python reads the text as a number; pydantic refuses all other text in its own words."""
    try:
        float(text)
    except ValueError:
        return False
    return True
