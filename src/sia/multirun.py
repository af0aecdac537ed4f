"""How a grid of runs ends: which of them did not finish, why, and the command that goes on."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sia import rundir
from sia.errors import SiaError

KILLED = "its process was killed, ran out of memory, or lost its machine"


class RunFailed(SiaError):
    """One run of a grid did not finish; crosses from its process to that of the grid."""

    exit_code = 1


class GridFailed(SiaError):
    """Some runs of a grid did not finish."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One run of a grid that did not finish.

    Attributes:
        overrides: All that the run was given.
        folder: Its run directory, which it may not have come to make.
        reason: What its process said; empty where it ended without a word.
        log: What its process printed, where that is in a file.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    reason: str = ""
    log: str = ""


def ended(folder: Path) -> bool:
    """Whether the run in `folder` finished, whatever became of its process afterwards."""
    return (folder / rundir.RUN_FILE).exists() and rundir.status(folder) == "finished"


def override(key: str, path: Path) -> str:
    """`key='path'`, which Hydra reads back as it is, whatever the path holds."""
    # In Hydra's grammar a backslash is itself unless a quote or the end follows.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), str(path))
    return f"{key}='{escaped}'"


def summary(
    failures: Sequence[Failure], *, overrides: Sequence[Sequence[str]], folder: Path
) -> str:
    """What a person reads at the end of a grid.

    Args:
        failures: At least one, in the order of their numbers.
        overrides: Of every run of the grid; what all have in common is not repeated.
        folder: Of the grid.
    """
    total = len(overrides)
    done = total - len(failures)
    lines = [f"{len(failures)} of {total} runs did not finish; {done} did. {folder}"]
    shared = set.intersection(*map(set, overrides)) if total > 1 else set()
    for one in failures:
        own = " ".join(word for word in one.overrides if word not in shared)
        lines.append(f"  run {one.number}  {own}".rstrip())
        lines.append(f"    {_reason(one)}")
        if one.log:
            lines.append(f"    it printed: {one.log}")
        lines.append(f"    {_command(one)}")
    if sum((one.folder / rundir.RUN_FILE).exists() for one in failures) > 1:
        lines.append(f"Go on with all that were begun: python -m sia.runs resume {_word(folder)}")
    return "\n".join(lines)


def _reason(failure: Failure) -> str:
    if failure.reason:
        return "\n    ".join(failure.reason.splitlines())
    if not (failure.folder / rundir.RUN_FILE).exists():
        return f"never began: {KILLED}"
    status = rundir.status(failure.folder)
    result = rundir.read_result(failure.folder)
    return f"{status}: {result.reason if result else KILLED}"


def _command(failure: Failure) -> str:
    if (failure.folder / rundir.RUN_FILE).exists():
        return f"go on: python -m sia resume={_word(failure.folder)}"
    place = f"hydra.run.dir={failure.folder}"
    return f"again: python -m sia {shlex.join([*failure.overrides, place])}"


def _word(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
