"""The meta backend that is a language model: sessions of an agent play both of its roles.

The Meta-Agent edits the first harness, the Feedback-Agent decides and edits ever after. A session
sees a workspace of files and leaves one; what it left is checked here before it costs an attempt.
"""

import difflib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from sia.errors import BadProposal, MetaBackendError
from sia.feedback import Shown
from sia.gateway.protocol import Role
from sia.meta.material import feedback_files, history_table, standing
from sia.meta.prompts import render
from sia.meta.protocol import Question, Request
from sia.meta.session import MAX_FILES, MAX_MIB, SessionEnd, Sessions, skipped
from sia.records import Candidate, Decision, Lever, Proposal
from sia.rundir import candidate_dir, write_atomic
from sia.sandbox.collect import collect_tree
from sia.sandbox.protocol import Limits
from sia.sandbox.staging import remove
from sia.tasks.harness import check_harness
from sia.tasks.task import Task

HARNESS = "harness"
PROPOSAL = "proposal.json"
DECISION = "decision.json"
NOTES = "notes"
MAX_ANSWER_KIB = 64  # of proposal.json and decision.json
MAX_TEXT = 2_000  # characters of a hypothesis and its like
MAX_COMPARED = 5_000  # lines of a file that are compared one by one
MAX_LISTED = 20  # files that one message names
SHORT_DECISION_TURNS = 8  # where there is nothing to choose but to go on or to stop
NOTHING_STATED = "(none given)"


class AgentBackend:
    """A MetaBackend whose every call is one session of an agent, or two.

    What it does is a function of the request and of what the run directory holds; it keeps nothing
    between calls.

    Args:
        sessions: Runs the agent.
        task: Its public side is shown.
        run: The run directory, for what earlier candidates left.
        attempt_s: Deadline of an attempt; the prompts state it.
        limits: Of an attempt; the prompts state them.
        target_model: Whether the target has a model to call.
    """

    def __init__(
        self,
        *,
        sessions: Sessions,
        task: Task,
        run: Path,
        attempt_s: float,
        limits: Limits,
        target_model: bool,
    ) -> None:
        self._sessions = sessions
        self._task = task
        self._run = run
        self._attempt_s = attempt_s
        self._limits = limits
        self._target_model = target_model

    def cancel(self) -> None:
        """Makes every session, in progress or to come, kill its processes and raise."""
        self._sessions.cancel()

    def propose(self, request: Request) -> Proposal:
        """One edited harness, from one session, or from a second one that was told what is wrong.

        Raises:
            BadProposal: After the second session the harness is still unusable or unchanged.
            MetaBackendError: Two sessions in a row could not reach their model.
            BudgetExceeded: A call was refused.
        """
        first = request.generation == 0
        folder = request.workspace.parent
        given = self._given(request.history, request.parent, with_past=not first)
        workspace = _Workspace(folder / "workspace", given, request.workspace)
        prompt = render(
            "meta" if first else "feedback",
            **self._facts(given),
            **self._contract(),
            generation=request.generation,
            standing=standing(request.history, request.parent, request.metric, self._run),
            decision=request.decision,
            siblings=[one.hypothesis for one in request.siblings if one.hypothesis],
            harness_is=f"{_origin(request.parent)}, to be edited",
        )

        def judge(end: SessionEnd) -> list[str]:
            may_stay = first and end.end != "error"
            problems = workspace.problems(end.refused, may_stay=may_stay)
            # Of a session that was cut off, a usable harness is enough.
            return problems or (workspace.strays_problem() if end.end == "done" else [])

        talk = self._converse(
            Role.META if first else Role.FEEDBACK,
            f"g{request.generation:03}-c{request.index}/meta",
            prompt,
            folder,
            workspace,
            judge,
            wanted=(HARNESS, PROPOSAL),
        )
        if problems := workspace.problems(talk.end.refused, may_stay=first):
            raise BadProposal("; ".join([*problems, talk.how]))
        changes = workspace.changes()
        try:
            said = _read_answer(workspace.path / PROPOSAL, _Stated)
        except _Unreadable:
            said = _Stated(hypothesis=NOTHING_STATED)
        evidence = [_text(said.evidence), talk.how if talk.noteworthy else ""]
        if strays := workspace.strays():
            evidence.append(f"Written outside {HARNESS}/, and dropped: {_listed(strays)}.")
        hypothesis = _text(said.hypothesis)
        if not changes:
            evidence.append("The harness was left as it was found: it is the baseline.")
        workspace.deliver(request.workspace)
        return Proposal(
            hypothesis=hypothesis or NOTHING_STATED,
            evidence="\n".join(filter(None, evidence)),
            expected_effect=_text(said.expected_effect),
            source=self._sessions.agent.name,
            changes=changes,
        )

    def decide(self, question: Question) -> Decision:
        """The agent's choice; the harness, and a word on it, where it makes no usable one.

        Raises:
            MetaBackendError: Two sessions in a row could not reach their model.
            BudgetExceeded: A call was refused.
        """
        remove(question.folder)
        question.folder.mkdir(parents=True)
        parent = question.parent
        harness = None
        if parent is not None:
            harness = candidate_dir(self._run, parent.generation, parent.index) / HARNESS
        given = self._given(question.history, parent, with_past=True)
        workspace = _Workspace(question.folder / "workspace", given, harness)
        levers = [lever.value for lever in question.levers]
        recipes = [choice.name for choice in question.recipes]
        prompt = render(
            "decision",
            **self._facts(given),
            generation=question.generation,
            standing=standing(question.history, parent, question.metric, self._run),
            levers=levers,
            recipes=question.recipes,
            updates=question.updates,
            references=question.references,
            harness_is=f"{_origin(parent)}, to be read",
        )
        agent = self._sessions.agent
        choices = [lever for lever in question.levers if lever is not Lever.STOP]
        short = min(SHORT_DECISION_TURNS, agent.max_turns) if len(choices) < 2 else agent.max_turns

        def judge(end: SessionEnd) -> list[str]:
            try:
                _read_decision(workspace.path / DECISION, levers, recipes)
            except _Unreadable as problem:
                return [str(problem)]
            return []

        talk = self._converse(
            Role.FEEDBACK,
            f"g{question.generation:03}/decision",
            prompt,
            question.folder,
            workspace,
            judge,
            wanted=(DECISION,),
            max_turns=short,
        )
        workspace.clear()
        if talk.problems:
            return Decision(
                lever=choices[0] if choices else Lever.STOP,
                hypothesis=f"(the agent gave no usable decision: {_listed(talk.problems)})",
                evidence=talk.how,
            )
        said = _read_decision(workspace.path / DECISION, levers, recipes)
        evidence = [_text(said.evidence), talk.how if talk.noteworthy else ""]
        return Decision(
            lever=Lever(said.lever),
            hypothesis=_text(said.hypothesis),
            evidence="\n".join(filter(None, evidence)),
            expected_effect=_text(said.expected_effect),
            recipe=said.recipe,
            settings=said.settings,
        )

    def _converse(
        self,
        role: Role,
        scope: str,
        prompt: str,
        folder: Path,
        workspace: "_Workspace",
        judge: Callable[[SessionEnd], list[str]],
        *,
        wanted: Sequence[str],
        max_turns: int | None = None,
    ) -> "_Talk":
        """A session, and a second one if `judge` finds problems in what the first one left.

        A session that ended in an error before its model had answered once says nothing about
        the agent: it is repeated as it was and does not count as a try, and another one like it
        right after ends the run, which can be resumed at this very step.
        """
        system = render("system")
        text = prompt
        number = tries = 0
        unreached = False
        while True:
            number += 1
            suffix = "" if number == 1 else f"-{number}"
            write_atomic(folder / f"prompt{suffix}.md", text.encode())
            end = self._sessions.run(
                role,
                scope + suffix,
                prompt=text,
                system=system,
                workspace=workspace.path,
                out=folder / f"session{suffix}",
                wanted=wanted,
                max_turns=max_turns,
            )
            workspace.restore()
            problems = judge(end)
            if problems and end.end == "error" and not end.answered:
                if unreached:
                    raise MetaBackendError(
                        f"meta={self._sessions.agent.name} could not work, twice in a row: "
                        f"{end.detail} (see {folder / f'session{suffix}'}). Nothing of this step "
                        f"is recorded; when it is mended: python -m sia resume={self._run}"
                    )
                unreached = True
                continue
            unreached = False
            tries += 1
            if not problems or tries == 2:
                return _Talk(end=end, problems=problems, tries=tries)
            text = render("retry", problems=problems, prompt=prompt)

    def _given(
        self, history: Sequence[Shown], parent: Candidate | None, *, with_past: bool
    ) -> dict[str, bytes]:
        """What the agent finds besides the harness and the data, by path."""
        given = {"task.md": self._task.text.read_bytes()}
        if with_past:
            given["history.md"] = history_table(history, self._task.metric, self._run).encode()
            files = feedback_files(history, parent, self._run)
            given.update({f"feedback/{name}": text for name, text in files.items()})
        return given

    def _facts(self, given: Mapping[str, bytes]) -> dict[str, object]:
        """What every prompt says of the task and the workspace."""
        names = {name.split("/")[1] for name in given if name.startswith("feedback/")}
        shown = []
        if "history.md" in given:
            shown.append(("history.md", "all candidates so far, their scores and hypotheses"))
            shown.append(
                ("feedback/scores.json", "the evaluation of the parent and of what came last")
            )
        if "failures.md" in names:
            shown.append(("feedback/failures.md", "some dev items that the parent got wrong"))
        if "trajectories" in names:
            shown.append(("feedback/trajectories/", "how the parent worked on some items"))
        if any(name.endswith("-stderr.txt") for name in names):
            shown.append(("feedback/*-stderr.txt", "the last words of candidates that failed"))
        return {
            "metric": self._task.metric,
            "n_dev": self._task.facts.splits.get("dev", 0),
            "shown": shown,
        }

    def _contract(self) -> dict[str, object]:
        """What the prompts for a harness say of the attempt."""
        submission = self._task.facts.submission
        one = ", or ".join(f"`{name}`" for name in submission.any_of)
        return {
            "files": [one or "whatever `task.md` asks for"]
            if submission.any_of or submission.tree
            else [f"`{name}`" for name in submission.files],
            "max_mib": submission.max_mib,
            "attempt_s": self._attempt_s,
            "memory_mib": self._limits.memory_mib,
            "processes": self._limits.processes,
            "file_mib": self._limits.file_mib,
            "disk_mib": self._limits.disk_mib,
            "threads": self._limits.threads,
            "target_model": self._target_model,
        }


@dataclass(frozen=True, kw_only=True)
class _Talk:
    """What came of one or two sessions."""

    end: SessionEnd
    problems: list[str]
    tries: int

    @property
    def noteworthy(self) -> bool:
        """Whether it was anything but one session that ended as it should."""
        return self.tries > 1 or self.end.end != "done"

    @property
    def how(self) -> str:
        """One sentence for the record."""
        which = "the session" if self.tries == 1 else "the second session"
        detail = f" ({self.end.detail})" if self.end.detail and self.end.end != "done" else ""
        return f"{which} ended: {self.end.end}{detail} after {self.end.turns} turns"


class _Workspace:
    """The folder that an agent works in: given files, the harness, and what the agent adds.

    Args:
        path: Made anew.
        given: Files by their paths; what an agent does to them is undone.
        harness: A copy of it is to be edited, or to be read; None: there is none.
    """

    def __init__(self, path: Path, given: Mapping[str, bytes], harness: Path | None) -> None:
        self.path = path
        self._given = dict(given)
        self._before: dict[str, bytes] = {}
        self._strays: list[str] = []
        remove(path)
        path.mkdir(parents=True)
        if harness is not None:
            refused = copy_harness(harness, path / HARNESS)
            if refused:
                raise MetaBackendError(
                    f"The harness {harness} cannot be given to an agent: "
                    f"{_listed(list(refused.values()))}. Make it a folder of regular files."
                )
            self._before = _contents(path / HARNESS)
        self._write_given()

    def restore(self) -> None:
        """Notes what the agent wrote where it should not have, and mends the given files."""
        self._strays = [
            name
            for name, content in sorted(_contents(self.path).items())
            if name.split("/")[0] not in (HARNESS, NOTES)
            and name not in (PROPOSAL, DECISION)
            and self._given.get(name) != content
        ]
        self._write_given()

    def problems(self, refused: Mapping[str, str], *, may_stay: bool) -> list[str]:
        """Why no attempt should be made with the harness; empty if one should."""
        found = []
        kept_out = [why for name, why in refused.items() if name.split("/")[0] == HARNESS]
        if kept_out:
            found.append(
                f"{HARNESS}/ may hold regular files only, {MAX_FILES} of them and {MAX_MIB} MiB at "
                f"most: {_listed(kept_out)}"
            )
        try:
            check_harness(self.path / HARNESS)
        except BadProposal as problem:
            found.append(str(problem))
        if not found and not may_stay and not self.changes():
            found.append(f"{HARNESS}/ is what it was before, file for file")
            if self._strays:
                found += self.strays_problem()
        return found

    def strays(self) -> list[str]:
        """Files that the agent wrote or changed outside its own, by path."""
        return self._strays

    def strays_problem(self) -> list[str]:
        """A message on them for the agent, or nothing."""
        if not self._strays:
            return []
        return [
            f"files were written where they do not belong: {_listed(self._strays)}. What is part "
            f"of the harness goes into {HARNESS}/; remove the rest, or move it to {NOTES}/"
        ]

    def changes(self) -> dict[str, str]:
        """What differs from the harness that was given: file -> how much, for the reader."""
        after = _contents(self.path / HARNESS)
        return {
            name: _extent(self._before.get(name), after.get(name))
            for name in sorted(self._before.keys() | after.keys())
            if self._before.get(name) != after.get(name)
        }

    def deliver(self, harness: Path) -> None:
        """Puts the edited harness into `harness`, where hidden files stay, and clears up."""
        if self.changes():
            for name in self._before:
                (harness / name).unlink()
            for folder, folders, files in os.walk(harness, topdown=False):
                if not folders and not files and Path(folder) != harness:
                    Path(folder).rmdir()
            shutil.copytree(self.path / HARNESS, harness, dirs_exist_ok=True)
        self.clear()

    def clear(self) -> None:
        """Keeps what the agent was given and what it stated; the harness lies elsewhere."""
        for name in (HARNESS, NOTES, *self._strays):
            if name not in self._given:
                remove(self.path / name)

    def _write_given(self) -> None:
        for name, content in self._given.items():
            path = self.path / name
            for above in reversed(path.relative_to(self.path).parents):
                if (self.path / above).is_file():  # the agent put it where a folder belongs
                    (self.path / above).unlink()
            if path.is_dir():
                remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


Answer = TypeVar("Answer")


class _Unreadable(Exception):
    """An answer of an agent cannot be used; the message says why."""


class _Stated(msgspec.Struct):
    hypothesis: str = ""
    evidence: str = ""
    expected_effect: str = ""


class _Decided(msgspec.Struct):
    lever: str
    hypothesis: str
    evidence: str = ""
    expected_effect: str = ""
    recipe: str = ""
    settings: dict[str, str | float | bool | None] = msgspec.field(default_factory=dict)


def copy_harness(source: Path, out: Path) -> dict[str, str]:
    """Copies what an agent gets to see of a harness: no hidden files, no caches.

    Returns what cannot be copied: path -> why.
    """
    fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return collect_tree(fd, out, skip=_hidden, max_files=MAX_FILES, max_mib=MAX_MIB)
    finally:
        os.close(fd)


def _origin(parent: Candidate | None) -> str:
    return f"the harness of {parent.id}" if parent else "the harness that the run starts from"


def _hidden(path: str) -> bool:
    return skipped(f"{HARNESS}/{path}")


def _contents(folder: Path) -> dict[str, bytes]:
    """All files by relative path; the folder holds regular files only."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _extent(before: bytes | None, after: bytes | None) -> str:
    """How much of a file was changed."""
    if after is None:
        return "removed"
    try:
        old = (before or b"").decode().splitlines()
        new = after.decode().splitlines()
    except UnicodeDecodeError:
        return f"{'new' if before is None else 'changed'}, {len(after)} bytes"
    if before is None:
        return f"new, {len(new)} lines"
    if max(len(old), len(new)) > MAX_COMPARED:
        return f"changed, {len(new)} lines"
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    added = removed = 0
    for tag, old_from, old_to, new_from, new_to in matcher.get_opcodes():
        if tag != "equal":
            removed += old_to - old_from
            added += new_to - new_from
    return f"+{added} -{removed} lines"


def _read_answer(path: Path, kind: type[Answer]) -> Answer:
    """A file that an agent wrote as its answer.

    Raises:
        _Unreadable: There is none, or it is not what was asked for.
    """
    try:
        if path.stat().st_size > MAX_ANSWER_KIB * 1024:
            raise _Unreadable(f"{path.name} has more than {MAX_ANSWER_KIB} KiB")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError:
        raise _Unreadable(f"there is no {path.name} in the workspace") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise _Unreadable(f"{path.name} is not what was asked for: {error}") from None


def _read_decision(path: Path, levers: Sequence[str], recipes: Sequence[str]) -> _Decided:
    """A usable `decision.json`.

    Raises:
        _Unreadable: There is none.
    """
    said = _read_answer(path, _Decided)
    if said.lever not in levers:
        raise _Unreadable(f"{path.name} has the lever {said.lever!r}, not one of {list(levers)}")
    if said.lever == Lever.WEIGHTS and said.recipe not in recipes:
        raise _Unreadable(f"{path.name} has the recipe {said.recipe!r}, not one of {list(recipes)}")
    if not _text(said.hypothesis):
        raise _Unreadable(f"{path.name} states no hypothesis")
    return said


def _text(text: str) -> str:
    """What an agent wrote, cut, without what cannot be printed or written as UTF-8."""
    kept = "".join(c for c in text.strip() if c.isprintable() or c == "\n")
    return kept if len(kept) <= MAX_TEXT else f"{kept[:MAX_TEXT]}…"


def _listed(names: Sequence[str]) -> str:
    """Names for a message; of many, the first."""
    more = len(names) - MAX_LISTED
    return "; ".join([*names[:MAX_LISTED], *([f"and {more} more"] if more > 0 else [])])
