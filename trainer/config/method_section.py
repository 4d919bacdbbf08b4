"""A section of the configuration whose keys are the settings of a chosen method: `examples: {method: forgetting, swap: .05}`.

The settings are a frozen dataclass of `sparsity`, in the mechanism's own file; this module reads its fields as keys. Values are
converted by pydantic ("5ep" where the unit is epochs) and checked by the dataclass. A key of another method is an error. A section
may have a second key that chooses settings, like `examples.rule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sparsity.settings import EPOCHS, Range, Settings, SettingsError, choose
from trainer.config.field_errors import reason
from trainer.config.values import Epochs, Section

SETTINGS = "settings"  # the field with the method's dataclass; in files its keys are keys of the section
RULE_SETTINGS = "rule_settings"  # that of the rule's, of a section that has one
CHOSEN = {"method": SETTINGS, "rule": RULE_SETTINGS}  # key that chooses settings -> the field with them


class MethodSection(Section):
    """Keys: `method`, the fields of a subclass, and those of the method's settings, which are the attribute `settings`."""

    method: str = "all"
    settings: Any = Field(default=None, validate_default=True)

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        """The settings class of each method, by name."""
        raise NotImplementedError

    @classmethod
    def choices(cls) -> Mapping[str, Mapping[str, type[Settings]]]:
        """The settings classes by name, for each key that chooses one."""
        return {"method": cls.methods()}

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys of all methods."""
        return [name for name in cls.model_fields if name not in CHOSEN.values()]

    @classmethod
    def keys_of(cls, name: str, choice: str = "method") -> list[str]:
        """The keys of the settings of a method, or of what another key chooses; [] for a name without settings."""
        kind = cls.choices()[choice].get(name)
        return [f.name for f in fields(kind)] if kind else []

    @classmethod
    def default_of(cls, choice: str) -> str:
        return cls.model_fields[choice].default

    @classmethod
    def all_keys(cls) -> list[str]:
        """The keys of the section, including those of every method."""
        return list(dict.fromkeys([*cls.own_keys(), *(key for choice in cls.choices() for key in cls.chosen_keys(choice))]))

    @classmethod
    def chosen_keys(cls, choice: str) -> list[str]:
        """The keys of everything that the key `choice` can choose."""
        return [key for name in cls.choices()[choice] for key in cls.keys_of(name, choice)]

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        parts: dict[str, Any] = {key: value for key, value in raw.items() if key in cls.own_keys()}
        others = {key: value for key, value in raw.items() if key not in parts}
        for choice in cls.choices():
            if choice != "method":
                mine = cls.chosen_keys(choice)
                parts[CHOSEN[choice]] = {key: others.pop(key) for key in list(others) if key in mine}
        return parts | {SETTINGS: others}

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        choose(cls.methods(), method)
        return method

    @field_validator(SETTINGS, mode="plain")
    @classmethod
    def _read(cls, raw: Any, info: ValidationInfo) -> Settings | None:
        return cls._read_chosen("method", raw or {}, info)

    @classmethod
    def _read_chosen(cls, choice: str, raw: Mapping[str, Any], info: ValidationInfo) -> Settings | None:
        """The settings that the key `choice` chooses; None if they have no class, or the key is already an error."""
        name = info.data.get(choice)
        if name is None:
            return None
        mine, kind = cls.keys_of(name, choice), cls.choices()[choice].get(name)
        values = {key: value for key, value in raw.items() if key in mine}
        settings, problems = read(kind, values) if kind else (None, [])
        problems += [cls._foreign(choice, name, key, value) for key, value in raw.items() if key not in mine]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return settings

    @model_serializer(mode="wrap")
    def _together(self, as_usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = as_usual(self)
        for field in CHOSEN.values():
            own.pop(field, None)
        of_rule = getattr(self, RULE_SETTINGS, None)
        return {"method": own.pop("method")} | plain(self.settings) | own | (plain(of_rule) if of_rule else {})

    @classmethod
    def _foreign(cls, choice: str, chosen: str, key: str, value: Any) -> InitErrorDetails:
        """A key that the chosen method (or rule) does not have: a setting of other methods, or unknown."""
        others = [name for name in cls.choices()[choice] if key in cls.keys_of(name, choice)]
        if not others:
            return InitErrorDetails(type="extra_forbidden", loc=(key,), input=value)
        section = cls.choices()[choice][others[0]].section
        return _problem(
            key, value,
            f"not a setting of {section}.{choice}={chosen}; set {section}.{choice}={'|'.join(others)}, or remove {section}.{key}",
        )  # fmt: skip


def read(kind: type[Settings], raw: Mapping[str, Any]) -> tuple[Settings | None, list[InitErrorDetails]]:
    """Settings from plain values of its keys, and the list of errors."""
    try:
        return kind(**vars(_reader(kind).model_validate(raw))), []
    except ValidationError as error:
        return None, [_problem(e["loc"], e["input"], reason(e)) for e in error.errors()]
    except SettingsError as error:
        return None, [_problem(name, raw.get(name), text) for name, text in error.problems.items()]
    except ValueError as error:
        return None, [_problem((), raw, str(error))]


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as plain YAML types, the inverse of `read`."""
    return _reader(type(settings)).model_construct(**vars(settings)).model_dump(mode="json")


@lru_cache
def _reader(kind: type[Settings]) -> type[BaseModel]:
    """A pydantic model with the fields of a settings dataclass, so that all invalid keys are reported at once."""
    hints = get_type_hints(kind, include_extras=True)
    keys: dict[str, Any] = {f.name: (_converted(hints[f.name]), f.default) for f in fields(kind)}
    return create_model(kind.__name__, __base__=Section, **keys)


def _converted(hint: Any) -> Any:
    """The pydantic type of a field: epochs from "5ep", numbers within their bounds, other types unchanged."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        bounds = next(part for part in parts if isinstance(part, Range))

        def bounded(value: Any) -> Any:
            if why := bounds.refusal(value):
                raise ValueError(why)
            return value

        return Annotated[Epochs if bounds.unit == EPOCHS else parts[0], AfterValidator(bounded)]
    if get_origin(hint) is tuple:
        return tuple[tuple(_converted(part) for part in parts)]  # pyright: ignore[reportInvalidTypeArguments]
    return hint


def _problem(where: str | tuple[int | str, ...], value: Any, why: str) -> InitErrorDetails:
    loc = (where,) if isinstance(where, str) else where
    return InitErrorDetails(type=PydanticCustomError("value_error", "{why}", {"why": why}), loc=loc, input=value)
