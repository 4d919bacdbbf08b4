"""The settings of a mechanism: a frozen dataclass in the mechanism's own file, one field per key of the configuration.

The type of a field has its unit and its bounds (`Share`, `Keep`, `Epochs`, `Count`, or a Literal), `setting` its default and its
meaning. The configuration reads both: `examples: {method: forgetting, swap: .05}` becomes ForgettingSettings(swap=.05). Bounds are
checked where a dataclass is made, so they hold for every caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from sparsity.types import Connect, Reduce  # they import torch, which is not needed to read a configuration


EPOCHS = "epochs"  # the unit of durations, which the configuration writes as "5ep"


@dataclass(frozen=True)
class Range:
    """Unit and bounds of a number; `least` and `most` are allowed, `above` and `below` are not."""

    unit: str
    least: float = -inf
    above: float = -inf
    most: float = inf
    below: float = inf

    def refusal(self, value: Any) -> str:
        """The bound that a value violates, as "must be ..."; "" for a valid value."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number ({self.unit})"
        if self.least <= value <= self.most and self.above < value < self.below:
            return ""
        bounds = ((">=", self.least), (">", self.above), ("<=", self.most), ("<", self.below))
        return "must be " + " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if abs(bound) != inf)


Share = Annotated[float, Range("share", least=0.0, below=1.0)]
"""A share that is removed: 0 <= share < 1."""
Keep = Annotated[float, Range("share", above=0.0, most=1.0)]
"""A share that is kept: 0 < share <= 1."""
Epochs = Annotated[float, Range(EPOCHS, least=0.0)]
Count = Annotated[int, Range("count", least=0)]


class RunLength(NamedTuple):
    """The length of a run in epochs, and the copies of an image in a batch (repeated augmentation)."""

    epochs: int
    repeats: int = 1


@dataclass(frozen=True)
class ByRun:
    """A default that depends on the length of the run, so that a mechanism acts in a short one too.

    text: how the reference of the configuration writes it. value: from the run and the numbers that are given for other settings.
    """

    text: str
    value: Callable[[RunLength, Mapping[str, float]], float]


def setting(default: Any, meaning: str, by_run: ByRun | None = None) -> Any:
    """A field of a settings dataclass: its default and one line for the reader of the configuration.

    by_run: what a configuration takes in place of `default`, which is the value for 300 epochs.
    """
    return field(default=default, metadata={"meaning": meaning, "by_run": by_run})


class SettingsError(ValueError):
    """Values outside their bounds. problems: {field: what it must be}."""

    def __init__(self, section: str, values: Mapping[str, Any], problems: Mapping[str, str]):
        self.problems = dict(problems)
        super().__init__("; ".join(f"{section}.{name}={values[name]!r}: {text}" for name, text in problems.items()))


@dataclass(frozen=True)
class Settings:
    """Base of all settings. section: their section of the configuration. Raises SettingsError, naming key, value and bounds."""

    section: ClassVar[str]
    off: ClassVar[bool] = False  # whether the method leaves nothing out

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        hints = get_type_hints(type(self), include_extras=True)
        problems = {name: text for name, value in values.items() if (text := _refusal(hints[name], value))}
        if problems:
            raise SettingsError(self.section, values, problems)


Kind = TypeVar("Kind", bound=Settings)


def choose(methods: Mapping[str, type[Kind]], name: str) -> type[Kind]:
    """The settings class of a method by name. Raises ValueError with the valid names."""
    if name in methods:
        return methods[name]
    section = next(iter(methods.values())).section
    raise ValueError(f"{section}.method={name!r}: unknown value; valid values: {', '.join(methods)}")


class Network(NamedTuple):
    """The network and run that a mechanism of level 2 or 3 is built for.

    has_class_token, global_pool, num_prefix (prefix tokens): of the VisionTransformer. carry_qkv: whether level 3 follows level 2, which
    then must gather queries, keys and values too. authors: `compat: authors`, the form of the Tri-Level reference code. position: of
    level 2, "attention" or "block".
    """

    has_class_token: bool = True
    global_pool: str = "token"
    carry_qkv: bool = True
    authors: bool = False
    num_prefix: int = 1
    position: str = "attention"

    def importance(self, name: str = "default") -> str:
        """The score that `tokens.importance` names here, for selection, mass and distillation alike: never "default", and one name for
        equal scores (`prefix` is `cls` where [CLS] is the only prefix token)."""
        if name == "default":
            name = "received" if not self.has_class_token else "prefix" if self.position == "block" else "cls"
        return "cls" if name == "prefix" and self.has_class_token and self.num_prefix == 1 else name

    def default_before(self) -> tuple[str, str]:
        """What "default" meant where that word itself was stored (up to 2026-11): the scores of value-based selection, and of mass and
        distillation. They differed for networks with several prefix tokens."""
        value, others = "cls" if self.has_class_token else "received", "prefix" if self.num_prefix else "received"
        return self.importance(value), self.importance(others)


@dataclass(frozen=True)
class _LevelSettings(Settings):
    """Common base of levels 2 and 3."""

    @property
    def final_keep(self) -> float:
        """The share kept at the end of the schedule: the setting `keep` if the method has one, else 1."""
        return float(getattr(self, "keep", 1.0))

    @property
    def in_reference_code(self) -> bool:
        """Whether the Tri-Level reference code has this method, with these settings (`compat: authors`)."""
        return False


@dataclass(frozen=True)
class TokenSettings(_LevelSettings):
    """Base of the settings of level 2."""

    section: ClassVar[str] = "tokens"
    ranks_by_importance: ClassVar[bool] = False  # whether each image may keep its own number of tokens (`adaptive`)

    @property
    def windowed(self) -> Literal["received", "random", ""]:
        """By what it keeps tokens in networks whose attention is in windows (Swin); "" if it needs attention between all tokens."""
        return ""

    def build(self, network: Network) -> Reduce:
        """The mechanism. Raises ValueError, naming key and remedy, for an unsupported network."""
        raise NotImplementedError

    def importance_in(self, network: Network) -> str:
        """The score of mass and distillation, see `Network.importance`; a method that ranks by one has the same for its selection."""
        return network.importance(getattr(self, "importance", "default"))

    def refuse_keep(self, keep: float) -> None:
        """Raises ValueError if the method has no effect in a run that ends with the keep ratio `keep`."""

    @property
    def fixed_by(self) -> str:
        """The setting that fixes the number of tokens regardless of the keep ratio, as key=value; "" if there is none."""
        return ""

    @property
    def dropped_are(self) -> str:
        """What becomes of dropped patches, for titles of pictures; "" if they are discarded."""
        return ""


@dataclass(frozen=True)
class ConnectionSettings(_LevelSettings):
    """Base of the settings of level 3."""

    section: ClassVar[str] = "connections"

    def build(self, network: Network) -> Connect:
        """The mechanism. Raises ValueError, naming key and remedy, for an unsupported network."""
        raise NotImplementedError


def _refusal(hint: Any, value: Any) -> str:
    """The error of a value for a field of this type, as "must be ..."; "" for a valid value."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((text for part in parts[1:] if isinstance(part, Range) and (text := part.refusal(value))), "")
    if origin is Literal and value not in parts:
        return f"unknown value; valid values: {', '.join(map(str, parts))}"
    if hint is bool and not isinstance(value, bool):
        return "must be true or false"
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return "must be a list"
        each = [parts[0]] * len(value) if parts[1:] == (...,) else list(parts)
        if len(each) != len(value):
            return f"must have {len(each)} entries, got {len(value)}"
        return next(
            (
                f"entry {i}: {text}"
                for i, (part, one) in enumerate(zip(each, value, strict=True))
                if (text := _refusal(part, one))
            ),
            "",
        )
    return ""
