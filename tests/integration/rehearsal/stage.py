"""A run directory with one agent that follows the task's text, and no model."""

import json
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sia import seeds
from sia.feedback import Shown
from sia.gateway.protocol import Role
from sia.meta import Question, Request
from sia.meta.agent import AgentBackend
from sia.meta.agents import Agent
from sia.meta.session import Sessions
from sia.records import Candidate, Decision, Lever, Outcome, Proposal
from sia.sandbox import Endpoint, Limits, Sandbox
from sia.sandbox.environments import current_runtime
from sia.sandbox.protocol import Runtime
from sia.tasks.task import Task, load_task
from sia.workspace import Workspaces

DRIVER = Path(__file__).with_name("driver.py")
LIMITS = Limits(memory_mib=2048, processes=64, file_mib=100, disk_mib=300, output_kib=64)
TASK_YAML = """
name: toy
version: 1
title: A toy
metric: {name: accuracy}
submission: {files: [submission.csv], max_mib: 2}
source: {kind: generated}
splits: {train: 1, dev: 200, test: 200}
"""
REFERENCE = "print('reference')\n"


class Rehearsed(Agent):
    """An agent whose every move is written down beforehand."""

    name = "rehearsed"
    package = "json"
    install = ""
    limits = LIMITS

    @property
    def program(self) -> Path:
        return DRIVER

    def runtime(self) -> Runtime:
        return current_runtime()


@dataclass
class Lease:
    endpoint: Endpoint
    refused: str = ""
    answered: int = 0


@dataclass
class Door:
    """The gateway of an agent that asks nothing: a socket that is there, and its visitors.

    Each session is taken to have been answered once, or as often as `answers` says in turn.
    """

    folder: Path
    refused: str = ""
    answers: list[int] = field(default_factory=list)
    leases: list[tuple[Role, str]] = field(default_factory=list)

    @contextmanager
    def lease(self, role: Role, scope: str, *, policy: Path | None = None) -> Iterator[Lease]:
        self.leases.append((role, scope))
        path = self.folder / "gateway.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            endpoint = Endpoint(socket=path, port=9, key="throw-away", model="rehearsed-1")
            try:
                yield Lease(endpoint, self.refused, self.answers.pop(0) if self.answers else 1)
            finally:
                path.unlink()


@dataclass
class Stage:
    """Everything that a backend needs, in one folder."""

    root: Path
    sandbox: Sandbox
    session_s: float = 60.0
    left_s: float = math.inf
    limits: Limits = LIMITS
    history: list[Shown] = field(default_factory=list)

    def __post_init__(self) -> None:
        folder = self.root / "toy"
        for name in ("harness", "data/public", "data/private/dev", "data/private/test"):
            (folder / name).mkdir(parents=True)
        (folder / "task.yaml").write_text(TASK_YAML)
        for name in ("prepare.py", "verify.py"):
            (folder / name).touch()
        (folder / "data/public/train.csv").write_text("id,answer\n0,b\n")
        (folder / "harness/target_agent.py").write_text(REFERENCE)
        self.task_folder = folder
        self.run = self.root / "run"
        self.run.mkdir(parents=True)
        self.door = Door(self.root)
        self.workspaces = Workspaces(run=self.run, first=folder / "harness")
        self.plays([], decision=[])

    def plays(self, *proposal: object, decision: Sequence[str] = (), first: object = None) -> None:
        """Writes what the agent does in the first and in the second session."""
        parts = {"proposal": proposal, "decision": decision}
        if first is not None:
            parts["first"] = first
        (self.task_folder / "task.md").write_text(f"# The toy\n\nREHEARSAL {json.dumps(parts)}\n")

    @property
    def task(self) -> Task:
        return load_task(self.task_folder)

    def sessions(self) -> Sessions:
        return Sessions(
            agent=Rehearsed(model="rehearsed-1", session_s=self.session_s),
            sandbox=self.sandbox,
            gateway=self.door,
            data=self.task.public_dir,
            limits=self.limits,
            left_s=lambda: self.left_s,
        )

    def backend(self) -> AgentBackend:
        return AgentBackend(
            sessions=self.sessions(),
            task=self.task,
            run=self.run,
            attempt_s=20,
            limits=LIMITS,
            target_model=False,
        )

    def candidate(self, generation: int, **said: object) -> Candidate:
        return Candidate(
            id=f"g{generation:03}-c0",
            generation=generation,
            index=0,
            parent=f"g{generation - 1:03}-c0" if generation else None,
            proposal=Proposal(**{"hypothesis": "An idea.", **said}),
            harness_sha256="0" * 64,
        )

    def scored(self, generation: int = 0, **shown: object) -> Candidate:
        """A candidate with a harness on disk and a line in the history."""
        candidate = self.candidate(generation)
        if not self.workspaces.harness(candidate).exists():
            self.workspaces.open(generation, 0, None)
        known = {"outcome": Outcome.OK, "reason": "", "score": 0.5}
        self.history.append(Shown(candidate=candidate, **{**known, **shown}))
        return candidate

    def request(self, generation: int, parent: Candidate | None = None, **other: object) -> Request:
        known = {
            "generation": generation,
            "index": 0,
            "decision": Decision(lever=Lever.HARNESS, hypothesis="Try harder."),
            "workspace": self.workspaces.open(generation, 0, parent),
            "parent": parent,
            "history": tuple(self.history),
            "siblings": (),
            "state": self.run / "meta",
            "metric": self.task.metric,
            "seed": seeds.stream_seed(0, f"meta/{generation}/0"),
        }
        return Request(**{**known, **other})

    def question(self, generation: int, parent: Candidate | None, **other: object) -> Question:
        known = {
            "generation": generation,
            "parent": parent,
            "folder": self.run / f"gen-{generation:03}" / "decision",
            "history": tuple(self.history),
            "levers": (Lever.HARNESS, Lever.STOP),
            "recipes": (),
            "updates": (),
            "references": False,
            "state": self.run / "meta",
            "metric": self.task.metric,
            "seed": 0,
        }
        return Question(**{**known, **other})

    def first(self, *acts: str) -> tuple[Proposal, Path]:
        """Generation 0; the proposal and the harness that came of it."""
        self.plays(*acts)
        request = self.request(0)
        return self.backend().propose(request), request.workspace

    def edit(self, *acts: str) -> tuple[Proposal, Path]:
        """Generation 1, made from a scored reference."""
        self.plays(*acts)
        parent = self.history[-1].candidate if self.history else self.scored()
        request = self.request(1, parent)
        return self.backend().propose(request), request.workspace
