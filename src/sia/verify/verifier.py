"""Scores a submission with the task's verifier, in a process that the target never shares."""

import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sia.records import Evaluation, Outcome, from_data
from sia.tasks.task import Task
from sia.verify.failures import sample_failures

START_GRACE_S = 120.0  # for the imports of a verify.py on a cold machine


class Verifier(Protocol):
    """Turns a submission into an evaluation; deterministic, never raises for a bad submission."""

    def verify(self, candidate: str, submission: Path) -> Evaluation:
        """Scores the files in `submission` on this verifier's split."""
        ...

    def close(self) -> None:
        """Ends the verifier's process."""
        ...


class TaskVerifier:
    """The `verify.py` of a task on one split, kept warm. Safe to use from several threads."""

    def __init__(self, *, task: Task, split: str, deadline_s: float | None = None) -> None:
        """Starts the process; its imports go on while the first attempt runs."""
        self._task = task
        self._split = split
        self._deadline_s = deadline_s or task.facts.limits.verify_s
        self._lock = threading.Lock()
        self._process = self._start()

    def verify(self, candidate: str, submission: Path) -> Evaluation:
        """Scores one submission; a second try with a new process if the first one is gone."""
        request = {
            "submission": str(submission.resolve()),
            "labels": str(self._task.labels_dir(self._split)),
            "deadline_s": self._deadline_s,
        }
        with self._lock:
            answer = self._ask(request)
            if answer is None:
                self._stop()
                self._process = self._start()
                answer = self._ask(request) or {"failed": "the verifier's process died twice"}
        return self._evaluation(candidate, answer)

    @property
    def pid(self) -> int:
        """Of the verifier's process."""
        return self._process.pid

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "sia.verify.worker", str(self._task.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_clean_environment(),
            start_new_session=True,
        )

    def _stop(self) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None where the process is gone or does not answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError:
            return None
        buffer = b""
        deadline = time.monotonic() + self._deadline_s + START_GRACE_S
        while not buffer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                return None
            chunk = os.read(stdout.fileno(), 1 << 20)
            if not chunk:
                return None
            buffer += chunk
        answer: dict[str, Any] = json.loads(buffer)
        return answer

    def _evaluation(self, candidate: str, answer: dict[str, Any]) -> Evaluation:
        blank = Evaluation(
            candidate=candidate,
            split=self._split,
            score=None,
            n_items=self._task.facts.splits.get(self._split, 0),
        )
        if "refused" in answer:
            return replace(blank, outcome=Outcome.BAD_SUBMISSION, problem=answer["refused"])
        if "failed" in answer:
            return replace(blank, outcome=Outcome.VERIFIER_FAILED, problem=answer["failed"])
        try:
            found = from_data(
                {**answer["ok"], "candidate": candidate, "split": self._split, "failures": []},
                Evaluation,
            )
            answers = from_data(answer["ok"].get("answers", {}), dict[str, str])
        except msgspec.ValidationError as error:
            return replace(
                blank,
                outcome=Outcome.VERIFIER_FAILED,
                problem=f"verify() of task {self._task.name!r} breaks its contract: {error}",
            )
        if found.score is None or not math.isfinite(found.score):
            return replace(
                blank,
                outcome=Outcome.VERIFIER_FAILED,
                problem=f"verify() of task {self._task.name!r} gave the score {found.score!r}",
            )
        if self._split != "dev" or not answers:  # nothing of another split may reach a proposal
            return found
        return replace(found, failures=sample_failures(found.items, answers, self._task.metric))


def _clean_environment() -> dict[str, str]:
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")
    clean = {name: os.environ[name] for name in kept if name in os.environ}
    blas = {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")}
    return {**clean, **blas, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
