"""A backend that follows a script: for tests, demonstrations and measurements of the loop."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sia.errors import BadProposal, ConfigError
from sia.meta.knobs import write_knobs
from sia.meta.protocol import Question, Request
from sia.records import Decision, Lever, Proposal


@dataclass(frozen=True, kw_only=True)
class Step:
    """What happens in one generation.

    Attributes:
        set: Values to set in `harness.yaml`.
        files: Files of the harness to write, name -> text.
        fail: Raise BadProposal with this text instead.
        stop: End the run before this generation.
    """

    set: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    fail: str = ""
    stop: bool = False


class Scripted:
    """Plays one step per generation after the first; without a script, counts `turn` upwards."""

    def __init__(self, *, script: str | None = None) -> None:
        """Reads the script, a YAML list of steps.

        Raises:
            ConfigError: The file is missing or not a list of steps.
        """
        self._steps = None if script is None else _read(Path(script))

    def propose(self, request: Request) -> Proposal:
        """Applies the step of this generation; generation 0 is the reference harness unchanged."""
        if request.generation == 0:
            return Proposal(hypothesis="The first harness.", source="reference")
        step = self._step(request.generation, request.index)
        if step.fail:
            raise BadProposal(step.fail)
        if step.set:
            write_knobs(request.workspace, step.set)
        for name, text in step.files.items():
            (request.workspace / name).write_text(text, encoding="utf-8")
        return Proposal(
            hypothesis="The script says so.",
            source="script",
            changes={
                **step.set,
                **{name: f"{len(text)} characters" for name, text in step.files.items()},
            },
        )

    def decide(self, question: Question) -> Decision:
        """Stops where the script ends or says so."""
        coming = question.generation + 1
        if self._steps is not None and (coming > len(self._steps) or self._steps[coming - 1].stop):
            return Decision(lever=Lever.STOP, hypothesis="The script ends here.")
        return Decision(lever=Lever.HARNESS, hypothesis="The script goes on.")

    def _step(self, generation: int, index: int) -> Step:
        if self._steps is None:
            return Step(set={"turn": 1_000 * index + generation})
        return self._steps[generation - 1]


def _read(path: Path) -> list[Step]:
    try:
        return msgspec.convert(yaml.safe_load(path.read_text("utf-8")), list[Step])
    except (OSError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"meta.script={str(path)!r} is not a list of steps: {error}") from error
