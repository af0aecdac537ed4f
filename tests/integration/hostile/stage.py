"""A toy task on disk, and runners that remember how their targets can be found."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from sia.errors import TargetError
from sia.records import Attempt
from sia.sandbox import Bwrap, Environments, Job, Limits, Process, Sandbox
from sia.sandbox.execution import marked
from sia.sandbox.launch import trial
from sia.sandbox.protocol import Launch
from sia.target import HarnessRunner
from sia.tasks.task import Task, load_task

HOSTILE = Path(__file__).parent
TASK_YAML = """
name: toy
version: 1
title: A toy
metric: {name: accuracy}
submission: {files: [submission.csv], max_mib: 2}
source: {kind: generated}
splits: {train: 1, dev: 1, test: 1}
"""
LABEL = "1,the-private-label\n"
LIMITS = Limits(memory_mib=2048, processes=64, file_mib=16, disk_mib=32, output_kib=64)


def make_task(root: Path) -> Task:
    """A task whose public side has `train.csv`, and `hints.json` once a test has written it."""
    for folder in ("harness", "data/public", "data/private/dev", "data/private/test"):
        (root / folder).mkdir(parents=True)
    (root / "task.yaml").write_text(TASK_YAML)
    for name in ("task.md", "prepare.py", "verify.py", "harness/target_agent.py"):
        (root / name).touch()
    (root / "data/public/train.csv").write_text("id,answer\n0,b\n")
    for split in ("dev", "test"):
        (root / "data/private" / split / "labels.csv").write_text(LABEL)
    return load_task(root)


@dataclass
class Remembering:
    """A sandbox that passes everything on and remembers the markers."""

    inner: Sandbox
    markers: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def shields_data(self) -> bool:
        return self.inner.shields_data

    @property
    def host_runtime(self) -> bool:
        return self.inner.host_runtime

    @property
    def protects(self) -> str:
        return self.inner.protects

    def check(self) -> None:
        self.inner.check()

    def launch(self, job: Job) -> Launch:
        self.markers.append(job.marker)
        return self.inner.launch(job)

    def alive(self) -> list[int]:
        return [pid for marker in self.markers for pid in marked(marker)]


class UserNamespaceBwrap(Bwrap):
    """What root gets where it lacks the capabilities to change user ids."""

    def __init__(self) -> None:
        super().__init__()
        self._own_uid = False

    def check(self) -> None:
        if reason := trial(self):
            raise TargetError(reason)


SANDBOXES = {"bwrap": Bwrap, "bwrap-userns": UserNamespaceBwrap, "process": Process}


@dataclass
class Stage:
    task: Task
    sandbox: Remembering
    root: Path
    limits: Limits = LIMITS

    def runner(self, limits: Limits | None = None) -> HarnessRunner:
        return HarnessRunner(
            sandbox=self.sandbox,
            environments=Environments(self.root / "environments"),
            task=self.task,
            limits=limits or self.limits,
        )

    def harness(self, name: str) -> Path:
        copy = self.root / "harnesses" / name
        if not copy.exists():
            shutil.copytree(HOSTILE / name, copy)
        return copy

    def out(self, name: str) -> Path:
        return self.root / "attempts" / name

    def run(self, name: str, *, deadline_s: float = 30, limits: Limits | None = None) -> Attempt:
        runner = self.runner(limits)
        return runner.run(
            name, harness=self.harness(name), out=self.out(name), deadline_s=deadline_s
        )

    def submitted(self, name: str) -> str:
        return (self.out(name) / "submission" / "submission.csv").read_text()


def why_not(kind: str) -> str:
    """Why a sandbox cannot be tested on this machine; empty when it can."""
    try:
        SANDBOXES[kind]().check()
    except TargetError as error:
        return str(error)
    return ""
