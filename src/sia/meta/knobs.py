"""Knobs: what a harness declares as changeable in `space.yaml`, set in its `harness.yaml`.

knobs:
  classifier.C: {low: 0.1, high: 30.0, log: true, idea: Less regularisation fits rare charges}
  rerank.use: {values: [false, true], idea: ...}
  rerank.top_k: {values: [3, 5], needs: {rerank.use: true}, idea: ...}
moves:
  - when: {symptom: in_top5_share, above: 0.08}
    set: {rerank.use: true}
    hypothesis: ...
    expect: "+0.5 to +1.5 points"
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sia.errors import TaskError

Knobs = dict[str, Any]

BOOLEANS = ("on", "off", "yes", "no")  # to YAML 1.1, which PyYAML reads


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One changeable value: categorical (`values`) or a range (`low` to `high`).

    Attributes:
        needs: The knob matters only while these knobs have these values.
        idea: Why turning it could help.
    """

    idea: str
    values: tuple[Any, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    needs: dict[str, Any] = field(default_factory=dict)

    def allows(self, value: Any) -> bool:
        """Whether `value` lies in the declared range or list."""
        if self.values:
            return any(value == allowed and type(value) is type(allowed) for allowed in self.values)
        assert self.low is not None
        assert self.high is not None
        return isinstance(value, int | float) and self.low <= value <= self.high

    def active(self, knobs: Mapping[str, Any]) -> bool:
        """Whether the knob matters under `knobs`."""
        return all(knobs.get(name) == value for name, value in self.needs.items())


@dataclass(frozen=True, kw_only=True)
class When:
    """A condition on one symptom of the incumbent; empty: always true."""

    symptom: str = ""
    above: float | None = None
    below: float | None = None

    def holds(self, symptoms: Mapping[str, float]) -> bool:
        """Whether the condition is met; a symptom that is not shown is not met."""
        if not self.symptom:
            return True
        value = symptoms.get(self.symptom)
        if value is None:
            return False
        above = self.above is None or value > self.above
        below = self.below is None or value < self.below
        return above and below

    def describe(self, symptoms: Mapping[str, float]) -> str:
        """The condition with the value that met it, for the reader."""
        if not self.symptom:
            return "a standard step that needs no symptom"
        limit = f"> {self.above:g}" if self.above is not None else f"< {self.below:g}"
        return f"{self.symptom} = {symptoms[self.symptom]:.3f} ({limit})"


@dataclass(frozen=True, kw_only=True)
class Move:
    """What an expert would try on seeing a symptom."""

    set: dict[str, Any]
    hypothesis: str
    expect: str
    when: When = field(default_factory=When)


@dataclass(frozen=True, kw_only=True)
class Space:
    """`space.yaml`, typed."""

    knobs: dict[str, Knob]
    moves: tuple[Move, ...] = ()


def load_space(harness: Path) -> Space:
    """Reads and checks the declared space of a harness.

    Raises:
        TaskError: There is none, or it names a knob that `harness.yaml` does not have.
    """
    path = harness / "space.yaml"
    try:
        space = msgspec.convert(yaml.safe_load(path.read_text("utf-8")), Space)
    except OSError as error:
        raise TaskError(
            f"{harness} declares no space.yaml, which meta=optuna needs. See docs/tasks.md."
        ) from error
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise TaskError(f"{path} is not a valid space: {error}") from error
    known = read_knobs(harness, space)
    for place, names in _mentioned(space):
        if unknown := sorted(names - known.keys()):
            raise TaskError(f"{path}: {place} names {unknown[0]!r}, which is not among the knobs.")
    for name, knob in space.knobs.items():
        if bool(knob.values) == (knob.low is not None or knob.high is not None):
            raise TaskError(f"{path}: knob {name!r} needs either values, or low and high.")
        if not knob.allows(known[name]):
            raise TaskError(
                f"{path}: knob {name!r} cannot have its present value {known[name]!r}. "
                "Widen the knob, or change harness.yaml."
            )
    return space


def read_knobs(harness: Path, space: Space) -> Knobs:
    """The present value of every knob.

    Raises:
        TaskError: `harness.yaml` has no such key.
    """
    path = harness / "harness.yaml"
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    values = {}
    for name in space.knobs:
        node = tree
        for part in name.split("."):
            if not isinstance(node, dict) or part not in node:
                hint = (
                    " YAML reads this name as a boolean: call it `use`." if part in BOOLEANS else ""
                )
                raise TaskError(f"{path} has no value for the knob {name!r} of space.yaml.{hint}")
            node = node[part]
        values[name] = node
    return values


def write_knobs(harness: Path, changes: Mapping[str, Any]) -> None:
    """Sets values in `harness.yaml`; comments and order stay, so that the diff shows the change."""
    from ruamel.yaml import YAML

    path = harness / "harness.yaml"
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 1_000
    tree = editor.load(path.read_text("utf-8")) if path.is_file() else {}
    for name, value in changes.items():
        *parents, last = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    with path.open("w", encoding="utf-8") as file:
        editor.dump(tree, file)


def settle(space: Space, knobs: Mapping[str, Any], base: Mapping[str, Any]) -> Knobs:
    """`knobs` with every knob that does not matter put back to its value in `base`.

    Two assignments that lead to the same behaviour become equal.
    """
    settled = {**base, **knobs}
    for name, knob in space.knobs.items():
        if not knob.active(settled):
            settled[name] = base[name]
    return settled


def _mentioned(space: Space) -> list[tuple[str, set[str]]]:
    places = [(f"needs of {name}", set(knob.needs)) for name, knob in space.knobs.items()]
    return places + [(f"move {i}", set(move.set)) for i, move in enumerate(space.moves)]
