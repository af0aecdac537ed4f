"""Harness folders inside a run: copied from the parent, edited by the meta backend, then sealed."""

import difflib
import shutil
from pathlib import Path

from sia.errors import RunDirectoryError
from sia.provenance import tree_sha256
from sia.records import Candidate, Proposal
from sia.rundir import candidate_dir, policy_dir, write_atomic, write_error
from sia.sandbox.staging import remove
from sia.tasks.harness import check_harness
from sia.tasks.task import ENTRY_POINT

MAX_DIFF_LINES = 4_000


class Workspaces:
    """The harness folders of one run."""

    def __init__(self, *, run: Path, first: Path) -> None:
        """Candidates without a parent start from a copy of `first`.

        That is a folder, or one file, which becomes the entry point.
        """
        self._run = run
        self._first = first

    def folder(self, candidate: Candidate) -> Path:
        """Where everything about a candidate lies."""
        return candidate_dir(self._run, candidate.generation, candidate.index)

    def harness(self, candidate: Candidate) -> Path:
        """The sealed harness of a candidate."""
        return self.folder(candidate) / "harness"

    def policy(self, candidate: Candidate) -> Path | None:
        """The policy that a candidate uses; None where no update has made one."""
        return policy_dir(self._run, candidate.policy) if candidate.policy else None

    def decision(self, generation: int) -> Path:
        """Where what led to the decision after a generation lies; made by whoever writes there."""
        return self._run / f"gen-{generation:03}" / "decision"

    def open(self, generation: int, index: int, parent: Candidate | None) -> Path:
        """A fresh copy of the parent's harness, to be edited in place; leftovers of a kill go."""
        folder = candidate_dir(self._run, generation, index)
        source = self._first if parent is None else self.harness(parent)
        try:
            remove(folder)  # a session that was killed may have left anything
            folder.mkdir(parents=True)
            if source.is_file():
                (folder / "harness").mkdir()
                shutil.copyfile(source, folder / "harness" / ENTRY_POINT)
            else:
                shutil.copytree(
                    source,
                    folder / "harness",
                    symlinks=True,
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
        except OSError as error:
            raise write_error(folder, error) from error
        except shutil.Error as error:
            raise RunDirectoryError(f"Cannot copy {source} to {folder}: {error}") from error
        return folder / "harness"

    def seal(self, harness: Path, parent: Candidate | None, proposal: Proposal) -> str:
        """Checks an edited harness, writes `improvement.md` and `harness.diff` beside it.

        Returns:
            The digest of the harness.

        Raises:
            BadProposal: No attempt could come of it.
        """
        check_harness(harness)
        before = self._first if parent is None else self.harness(parent)
        write_atomic(harness.parent / "improvement.md", render(proposal, parent).encode())
        write_atomic(harness.parent / "harness.diff", diff(before, harness).encode())
        return tree_sha256(harness)


def render(proposal: Proposal, parent: Candidate | None) -> str:
    """`improvement.md`: what was changed, why, and what is expected of it."""
    changes = "\n".join(f"- `{name}`: {value!r}" for name, value in proposal.changes.items())
    return (
        f"# {proposal.source or 'proposal'}\n\n"
        f"Parent: {parent.id if parent else 'the reference harness'}\n\n"
        f"## Hypothesis\n\n{proposal.hypothesis}\n\n"
        f"## Evidence\n\n{proposal.evidence or 'none'}\n\n"
        f"## Expected effect\n\n{proposal.expected_effect or 'not stated'}\n\n"
        f"## Changes\n\n{changes or 'none'}\n"
    )


def diff(before: Path, after: Path) -> str:
    """Unified diff of the text files of two harnesses; cut after `MAX_DIFF_LINES` lines."""
    old, new = _texts(before), _texts(after)
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            lines += difflib.unified_diff(
                old.get(name, "").splitlines(),
                new.get(name, "").splitlines(),
                fromfile=f"a/{name}",
                tofile=f"b/{name}",
                lineterm="",
            )
    if len(lines) > MAX_DIFF_LINES:
        lines = [*lines[:MAX_DIFF_LINES], f"… {len(lines) - MAX_DIFF_LINES} more lines"]
    return "".join(f"{line}\n" for line in lines)


def _texts(folder: Path) -> dict[str, str]:
    if folder.is_file():
        return {ENTRY_POINT: folder.read_text("utf-8", errors="replace")}
    texts = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts:
            texts[path.relative_to(folder).as_posix()] = path.read_text("utf-8", errors="replace")
    return texts
