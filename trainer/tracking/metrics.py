"""Converts journal lines to MLflow metrics, parameters, tags and data sets. Pure: knows MLflow's limits, does not import it.

MLflow's page has a section per prefix, in alphabetical order, and metrics without a prefix behind them. So what one looks at is in
`basic/` (`MAIN`: `basic/top1`, `basic/loss`, `basic/images_per_second`, ...), results have their kind (`eval/top5`, `density/0.5/top1`,
`weights/kept`, `run/device_hours`), load of the nodes is below `system/HOST`, and all else below `debug/`: `debug/grad_norm`,
`debug/phases/forward/median`, `debug/plan/tokens/03`, `debug/checkpoint/seconds`. Their step is the global optimizer step, their time
the journal's. Every number of a line is sent but the least and the slowest rank of a phase; texts, booleans and ids are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.config.credentials import without_credentials
from trainer.config.run_config import flat

PREFIX = {
    "step": "debug",
    "system": "system",
    "epoch": "debug/epoch",
    "plateau": "debug/plan",
    "checkpoint": "debug/checkpoint",
    "control": "debug/control",
    "probe": "debug/probe",
    "weights": "weights",
    "end": "run",
}
# fields of a step line, and the two scores, that are in the first section
MAIN = frozenset(
    "loss loss_labels loss_logits loss_tokens train_top1 images_per_second lr data_wait keep_examples keep_tokens keep_connections".split()
)
OF_EVALUATION = frozenset("top1 top5 loss worst_class".split())  # its other fields: images, broken, seconds, keep ratios
SCORES = {"eval/top1": "basic/top1", "eval_ema/top1": "basic/top1_ema"}
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
PARAM_LENGTH = 500  # limit of older servers; newer ones accept 6000
TAG_LENGTH = 5000
KEY_LENGTH = 250
LONGEST_LIST = 64

_POSITION = frozenset({"kind", "time", "attempt", "step", "epoch", "batch"})
_NO_TAG = frozenset({"kind", "time", "attempt", "config", "data", "versions", "classes", "tokens"})
_JOURNAL_ONLY = frozenset({"id", "ids", "per_class", "layer_bytes"})


class Metric(NamedTuple):
    key: str
    value: float
    time: int  # milliseconds since 1970
    step: int


def metrics(line: dict[str, Any], step: int) -> list[Metric]:
    """The metrics of a journal line at optimizer step `step`."""
    kind = line["kind"]
    prefix = PREFIX.get(kind)
    if kind in ("eval", "density"):
        prefix = f"{kind}_ema" if line.get("ema") else kind
    if kind == "density":
        prefix = f"{prefix}/{line.get('keep_tokens', 1.0):g}"
    if prefix is None or (kind == "epoch" and line.get("batch")):  # a resume writes the line of its epoch again
        return []
    facts = {k: v for k, v in line.items() if k not in _POSITION and not (k == "progress" and kind != "step")}
    if kind == "epoch" and facts.get("examples"):
        facts["kept_share"] = facts.get("kept", 0) / facts["examples"]
    time = int(line["time"] * 1000)
    if kind == "end":
        facts.pop("spent", None)  # the last step line has it, by_cause has the sum over attempts
    if kind == "step":
        facts |= {"phases": {phase: _brief(spread) for phase, spread in (line.get("phases") or {}).items()}}
    found = [Metric(_key(name), float(value), time, step) for name, value in _numbers(facts, prefix)]
    return [one._replace(key=_named(one.key)) for one in found]


def _named(name: str) -> str:
    """The name of a metric on MLflow's page."""
    field = name.removeprefix("debug/")
    if field in MAIN:
        return f"basic/{field}"
    if name.startswith(("eval", "density")) and name.rpartition("/")[2] not in OF_EVALUATION:
        return f"debug/{name}"
    return SCORES.get(name, name)


def _brief(spread: Any) -> Any:
    """A phase's median and maximum over ranks; the journal has the rest."""
    return {name: value for name, value in spread.items() if name in ("median", "max")} if isinstance(spread, dict) else spread


def params(config: dict[str, Any]) -> dict[str, str]:
    """Every setting by its dotted key; a value too long for MLflow is cut, with a note of its length."""
    return {
        _key(key): _cut(without_credentials(str(value)), PARAM_LENGTH, "config.yaml") for key, value in flat(config).items()
    }


def tags(start: dict[str, Any]) -> dict[str, str]:
    """Fields of a start line other than settings: commit, dirty, hosts, launcher, versions, the user's tags."""
    found = {f"version.{name}": value for name, value in (start.get("versions") or {}).items()}
    for name, value in start.items():
        if name not in _NO_TAG and not isinstance(value, dict) and value is not None:
            found[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    found["attempts"] = start.get("attempt", 0) + 1
    if start.get("commit"):
        found["mlflow.source.git.commit"] = start["commit"]
    found |= ((start.get("config") or {}).get("tracking") or {}).get("tags") or {}
    return {_key(name): _cut(str(value), TAG_LENGTH, "the journal") for name, value in found.items()}


def param_changes(have: dict[str, str], want: dict[str, str], before: dict[str, str], attempt: int) -> dict[str, str]:
    """Settings that a resume changed, as tags `param_drift.KEY` with one entry per change: MLflow's parameters can't change.

    have: the parameters in MLflow; want: those of this attempt; before: the tags in MLflow. A setting that is gone while the
    section's method is the same is no change: it was another method's, which earlier versions recorded too.
    """
    changed = {}
    for key in have:
        method = f"{key.partition('.')[0]}.method"
        if key not in want and method in have and have[method] == want.get(method):
            continue
        new = want.get(key, "(absent)")
        name = _key(f"param_drift.{key}")
        earlier = before.get(name, "")
        last = earlier.rpartition(" -> ")[2] or have[key]
        if new != last:
            changed[name] = _cut(
                f"{earlier}; " * bool(earlier) + f"attempt {attempt}: {last} -> {new}", TAG_LENGTH, "the journal"
            )
    return changed


def datasets(start: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sets of a start line: name, digest (the index fingerprint), source, images, classes, context."""
    found = []
    for split, facts in (start.get("data") or {}).items():
        if isinstance(facts, dict) and facts.get("fingerprint"):
            found.append(
                {
                    "name": str(facts.get("pattern") or split)[-500:],
                    "digest": str(facts["fingerprint"])[:36],
                    "source": {"uri": facts.get("pattern")},
                    "profile": {"num_rows": facts.get("images"), "classes": facts.get("classes")},
                    "context": {"train": "training"}.get(split, split),
                }
            )
    return found


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        if not abs(value) > 1e300:  # an integer of any length is valid JSON
            yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _JOURNAL_ONLY:
                yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(value, list) and len(value) <= LONGEST_LIST:
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{name}/{i:02}")


def _key(name: str) -> str:
    """MLflow accepts letters, digits, _ - . : / and spaces."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:KEY_LENGTH]


def _cut(text: str, length: int, whole: str) -> str:
    if len(text) <= length:
        return text
    note = f" ... (cut, {len(text)} characters; whole in {whole})"
    return text[: length - len(note)] + note
