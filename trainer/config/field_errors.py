"""The errors of pydantic in our words: what a value must be. Types: https://docs.pydantic.dev/latest/errors/validation_errors/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
KINDS = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "must be an integer of at most 64 bits",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', and begin with a letter or digit",
    "model_type": "must be a section, i.e. a mapping of keys to values",
    "model_attributes_type": "must be a section, i.e. a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "list_type": "must be a list, e.g. [1, 2]",
    "tuple_type": "must be a list, e.g. [1, 2]",
}


def reason(error: Mapping[str, Any]) -> str:
    """Why a value is refused, e.g. "must be >= 1", from an entry of `ValidationError.errors()`."""
    kind, context = error["type"], error.get("ctx", {})
    if error.get("input", "") is None and kind in KINDS:
        return "must not be null; give a value, or leave the key out"
    if kind in BOUNDS:
        sign, name = BOUNDS[kind]
        return f"must be {sign} {context[name]:g}"
    if kind == "literal_error":
        return f"unknown value; valid values: {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
    if kind == "too_long":
        return f"must have {context['max_length']} values, got {context['actual_length']}"
    if kind == "missing":  # of a list with a fixed number of values
        return f"value {int(error['loc'][-1]) + 1} is missing"
    return KINDS[kind] if kind in KINDS else error["msg"].removeprefix("Value error, ")
