"""Every key of a configuration with type, default, unit and meaning: `trilevel config`, docs/configuration.md. Read off the schema,
so it cannot differ from what a run accepts: meanings are the docstrings of the fields, those of a method stand in its own file."""

from __future__ import annotations

from dataclasses import MISSING, fields
from textwrap import wrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sparsity.settings import EPOCHS, Range, Settings
from trainer.config.errors import ConfigError, did_you_mean, same_name
from trainer.config.method_section import CHOSEN, MethodSection
from trainer.config.run_config import Config
from trainer.config.run_defaults import OF_OPTIM, by_run_of
from trainer.config.values import Duration, Section, Unit

HEAD = """# Configuration

Every key of a run's YAML. Made by `trilevel config --markdown > docs/configuration.md`; a test compares it with the schema.
`trilevel config KEY` prints one key or one section. On the command line a key is given as `section.key=value` behind the file.

Durations carry their unit: `5ep` (epochs, may be fractional) or `500step` (optimizer steps). Shares and probabilities are numbers from 0
to 1. A key with default *required* must be given; `null` means not set. A key of another method than the chosen one is refused.
A default like "epochs / 10" is a share of the run; `config.yaml` in the run directory has its value, the recipes have the papers' numbers.
Where a meaning names no reason to change a key, its default suits the recipes in configs/.
"""


class Key(NamedTuple):
    """One key. name: with its section, "data.batch". method: of a section with methods, the one that has the key, else "".
    choice: the key that chooses this method."""

    name: str
    method: str
    kind: str
    default: str
    meaning: str
    choice: str = "method"


def all_keys() -> list[Key]:
    """Every key, in the order of the schema."""
    found: list[Key] = []
    nested: list[tuple[str, type[Section]]] = []
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            nested.append((name, field.annotation))
        else:
            found.append(_key(name, field))
    for section, model in nested:
        methods = model.methods() if issubclass(model, MethodSection) else {}
        for name, field in model.model_fields.items():
            if name == "method":
                meaning = field.description or f"What the level leaves out; `{field.default}` leaves nothing out."
                found.append(Key(f"{section}.method", "", " | ".join(methods), str(field.default), meaning))
            elif name not in CHOSEN.values():
                found.append(_key(f"{section}.{field.alias or name}", field))
        for choice, kinds in (model.choices() if issubclass(model, MethodSection) else {}).items():
            for method, settings in kinds.items():
                found += [key._replace(choice=choice) for key in _settings_keys(section, method, settings)]
    return found


def select(name: str) -> list[Key]:
    """The key, or all keys of the section, called `name`. Raises ConfigError with what is near."""
    found = [key for key in all_keys() if key.name == name or key.name.startswith(name + ".")]
    if not found:
        known = sorted({key.name for key in all_keys()} | {key.name.partition(".")[0] for key in all_keys()})
        hint = same_name(name, known) or did_you_mean(name, known) or "`trilevel config` lists all"
        raise ConfigError(f"{name}: unknown key; {hint}")
    return found


def text(found: list[Key]) -> str:
    """For a terminal: a head line per key, its meaning below."""
    methods: dict[Key, list[str]] = {}  # methods that share a setting, word for word
    for key in found:
        methods.setdefault(key._replace(method=""), []).append(key.method)
    lines = []
    for key, names in methods.items():
        where = f"  ({key.choice} {', '.join(names)})" if names[0] else ""
        lines += [f"{key.name}{where}", f"    {key.kind}; default: {key.default.strip('*')}"]
        lines += wrap(key.meaning, 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    found = all_keys()
    top = [key for key in found if "." not in key.name]
    parts += ["## The run\n", _table(top)]
    for section in dict.fromkeys(key.name.partition(".")[0] for key in found if "." in key.name):
        mine = [key for key in found if key.name.startswith(section + ".")]
        model = Config.model_fields[section].annotation
        about = (model.__doc__ or "").replace("\n", " ").replace("    ", "").strip() if model else ""
        parts += [f"## {section}\n", *([about + "\n"] if about else []), _table([key for key in mine if not key.method])]
        for choice, method in dict.fromkeys((key.choice, key.method) for key in mine if key.method):
            chosen = [key for key in mine if (key.choice, key.method) == (choice, method)]
            parts += [f"With `{section}.{choice}: {method}`:\n", _table(chosen)]
    return "\n".join(parts)


def _table(found: list[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in found:
        cells = (f"`{key.name}`", key.kind, key.default, key.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _key(name: str, field: FieldInfo) -> Key:
    return Key(
        name, "", _kind(field.annotation, field.metadata), _default(name, field), " ".join((field.description or "").split())
    )


def _settings_keys(section: str, method: str, settings: type[Settings]) -> list[Key]:
    hints = get_type_hints(settings, include_extras=True)
    found = []
    for field in fields(settings):
        default = "*required*" if field.default is MISSING else _shown(field.default, hints[field.name])
        if by_run := by_run_of(field):
            default = by_run.text
        meaning = field.metadata.get("meaning", "")
        found.append(Key(f"{section}.{field.name}", method, _kind(hints[field.name], ()), default, _sentence(meaning)))
    return found


def _sentence(meaning: str) -> str:
    return meaning[:1].upper() + meaning[1:].rstrip(".") + "." if meaning else ""


def _default(name: str, field: FieldInfo) -> str:
    section, _, key = name.partition(".")
    if section == "optim" and key in OF_OPTIM:
        return OF_OPTIM[key].text
    if field.is_required():
        return "*required*"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()  # pyright: ignore
    return _shown(value, field.annotation, field.metadata)


def _shown(value: Any, hint: Any = None, metadata: Any = ()) -> str:
    """A default as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        unit = "ep" if _is_epochs(hint, metadata) else ""
        return f"{value:g}{unit}" if float(f"{value:g}") == value else f"{value:.4g}{unit}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(one) for one in value) + "]"
    return str(value) if value != {} else "{}"


def _is_epochs(hint: Any, metadata: Any) -> bool:
    parts = [*metadata, *(get_args(hint)[1:] if get_origin(hint) is Annotated else ())]
    return any((isinstance(part, Range) and part.unit == EPOCHS) or part == Unit("epochs") for part in parts)


def _kind(hint: Any, metadata: Any) -> str:
    """A type in words, with its bounds."""
    if get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        metadata = [*more, *metadata]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_kind(part, metadata) for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return " \\| ".join(map(str, get_args(hint))).replace("\\", "")
    if isinstance(hint, type) and issubclass(hint, Duration):
        return "duration"
    if get_origin(hint) in (tuple, list):
        parts = get_args(hint)
        kinds = [_kind(part, ()) for part in parts if part is not Ellipsis]
        if len(parts) == 1 or parts[1] is Ellipsis:
            return f"list of {kinds[0]}"
        return f"list of {len(kinds)} x {kinds[0]}" if len(set(kinds)) == 1 else f"[{'; '.join(kinds)}]"
    if get_origin(hint) is dict or hint is dict:
        return "mapping"
    name = {int: "integer", float: "number", str: "text", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))
    if hint is float and _is_epochs(None, metadata):
        name = "epochs"
    bounds = []
    for part in metadata:
        if isinstance(part, Range):
            signs = ((">=", part.least), (">", part.above), ("<=", part.most), ("<", part.below))
            bounds += [f"{sign} {bound:g}" for sign, bound in signs if abs(bound) != float("inf")]
        for kind, sign in ((Ge, ">="), (Gt, ">"), (Le, "<="), (Lt, "<")):
            if isinstance(part, kind):
                bounds.append(f"{sign} {getattr(part, kind.__name__.lower()):g}")  # pyright: ignore
        for sub in getattr(part, "metadata", ()):  # a pydantic Field inside Annotated
            for kind, sign in ((Ge, ">="), (Gt, ">"), (Le, "<="), (Lt, "<")):
                if isinstance(sub, kind):
                    bounds.append(f"{sign} {getattr(sub, kind.__name__.lower()):g}")  # pyright: ignore
    return f"{name} {', '.join(dict.fromkeys(bounds))}".strip()
