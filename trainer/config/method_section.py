"""A section of the configuration whose keys are the settings of a chosen method: `examples: {method: forgetting, swap: .05}`.

The settings are a frozen dataclass of `sparsity`, in the mechanism's own file; this module reads its fields as keys. Values are
converted by pydantic ("5ep" where the unit is epochs) and checked by the dataclass. A key of another method is an error.
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

SETTINGS = "settings"  # the field with the dataclass; in files its keys are keys of the section


class MethodSection(Section):
    """Keys: `method`, the fields of a subclass, and those of the method's settings, which are the attribute `settings`."""

    method: str = "all"
    settings: Any = Field(default=None, validate_default=True)

    @classmethod
    def methods(cls) -> Mapping[str, type[Settings]]:
        """The settings class of each method, by name."""
        raise NotImplementedError

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys of all methods."""
        return [name for name in cls.model_fields if name != SETTINGS]

    @classmethod
    def keys_of(cls, method: str) -> list[str]:
        """The keys of a method's settings; [] for an unknown method."""
        kind = cls.methods().get(method)
        return [f.name for f in fields(kind)] if kind else []

    @classmethod
    def default_method(cls) -> str:
        return cls.model_fields["method"].default

    @classmethod
    def all_keys(cls) -> list[str]:
        """The keys of the section, including those of every method."""
        return list(dict.fromkeys([*cls.own_keys(), *(key for method in cls.methods() for key in cls.keys_of(method))]))

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        own = cls.own_keys()
        return {k: v for k, v in raw.items() if k in own} | {SETTINGS: {k: v for k, v in raw.items() if k not in own}}

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        choose(cls.methods(), method)
        return method

    @field_validator(SETTINGS, mode="plain")
    @classmethod
    def _read(cls, raw: Any, info: ValidationInfo) -> Settings | None:
        method, raw = info.data.get("method"), raw or {}
        if method is None:  # already an error
            return None
        mine = cls.keys_of(method)
        settings, problems = read(cls.methods()[method], {key: value for key, value in raw.items() if key in mine})
        problems += [cls._foreign(method, key, value) for key, value in raw.items() if key not in mine]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return settings

    @model_serializer(mode="wrap")
    def _together(self, as_usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = as_usual(self)
        own.pop(SETTINGS)
        return {"method": own.pop("method")} | plain(self.settings) | own

    @classmethod
    def _foreign(cls, method: str, key: str, value: Any) -> InitErrorDetails:
        """A key that the method does not have: a setting of other methods, or unknown."""
        others = [name for name in cls.methods() if key in cls.keys_of(name)]
        if not others:
            return InitErrorDetails(type="extra_forbidden", loc=(key,), input=value)
        section = cls.methods()[method].section
        return _problem(
            key, value,
            f"not a setting of {section}.method={method}; set {section}.method={'|'.join(others)}, or remove {section}.{key}",
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
