"""Repeats the proposals and decisions of a recorded run, so that its scores can be checked."""

import shutil
from pathlib import Path
from typing import TypeVar

from sia.errors import BadProposal, MetaBackendError
from sia.meta.protocol import Question, Request
from sia.provenance import tree_sha256
from sia.records import Candidate, Decision, Generation, Lever, Proposal, from_data
from sia.rundir import CONFIG_FILE, candidate_dir, records

T = TypeVar("T")


class Replay:
    """Plays a run directory back; the harness of each candidate must have its recorded digest."""

    def __init__(self, *, run: str) -> None:
        """Reads the records of `run`.

        Raises:
            RunDirectoryError: `run` is not a run directory.
        """
        self._run = Path(run)
        self._records = records(self._run)

    def propose(self, request: Request) -> Proposal:
        """Puts the recorded harness into the workspace.

        Raises:
            MetaBackendError: The recording ends before, is damaged, or took another course.
            BadProposal: So it was recorded.
        """
        key = f"{request.generation:04}/{request.index}/candidate"
        candidate = self._record(key, Candidate)
        if candidate is None:
            raise MetaBackendError(f"{self._run} records no candidate for {key!r}.")
        parent = request.parent.id if request.parent else None
        if candidate.parent != parent:
            raise self._other_course(f"made {candidate.id} from {candidate.parent}, not {parent}")
        if candidate.problem:
            raise BadProposal(candidate.problem)
        source = candidate_dir(self._run, request.generation, request.index) / "harness"
        shutil.rmtree(request.workspace)
        shutil.copytree(source, request.workspace, symlinks=True)
        if tree_sha256(request.workspace) != candidate.harness_sha256:
            raise MetaBackendError(
                f"{source} is not what was recorded (its digest differs): it was changed."
            )
        return candidate.proposal

    def decide(self, question: Question) -> Decision:
        """The recorded decision; stops where the recording ends.

        Raises:
            MetaBackendError: The recorded generation has other candidates.
        """
        index = question.generation
        closed = self._record(f"{index:04}/generation", Generation)
        made = tuple(
            past.candidate.id for past in question.history if past.candidate.generation == index
        )
        if closed is not None and closed.candidates != made:
            raise self._other_course(f"has {', '.join(closed.candidates)}, not {', '.join(made)}")
        decision = self._record(f"{index:04}/decision", Decision)
        return decision or Decision(lever=Lever.STOP, hypothesis="The recording ends here.")

    def _other_course(self, difference: str) -> MetaBackendError:
        return MetaBackendError(
            f"{self._run} {difference}: to be replayed, it needs the task, the search and the seed "
            f"that {self._run / CONFIG_FILE} holds."
        )

    def _record(self, key: str, kind: type[T]) -> T | None:
        data = self._records.get(key)
        return None if data is None else from_data(data, kind)
