"""The two trackers that a run can choose. Neither imports MLflow into the run's process."""

import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from sia.tracking.location import Location, TrackingError, child_environment, locate

LOG_FILE = "tracking.log"


class NoTracking:
    """The option `tracking=none`: mirrors nothing."""

    def start(self, run: Path) -> None:
        """Does nothing."""

    def finish(self) -> str:
        """Returns an empty text."""
        return ""


class MlflowMirror:
    """The option `tracking=mlflow`: a child process follows the journal and writes to MLflow.

    The child reads the end of its standard input as the end of the run. So it also finishes its
    work, and exits, when the run's process is killed; and Ctrl-C in the terminal does not reach it.
    """

    def __init__(self, *, uri: str | None, artifacts: str | None, drain_s: float) -> None:
        """Takes settings; nothing is opened before `start`.

        Args:
            uri: MLflow's tracking URI; None means `mlflow.db` in the current folder. The variable
                `MLFLOW_TRACKING_URI` comes first.
            artifacts: Folder or URI of the artifacts; None means beside the database.
            drain_s: How long `finish` waits for the child.
        """
        self._uri = uri
        self._artifacts = artifacts
        self._drain_s = drain_s
        self._run = Path()
        self._child: subprocess.Popen[bytes] | None = None
        self._problem = ""
        self._repair = ""

    def start(self, run: Path) -> None:
        """Starts the child; failures are kept for `finish`."""
        self._run = run
        self._repair = f"python -m sia.tracking sync {shlex.quote(str(run))}"
        try:
            location = locate(option=self._uri, artifacts=self._artifacts)
            if location != locate(artifacts=self._artifacts):
                self._repair += f" --uri {shlex.quote(str(location))}"
            self._child = _spawn(run, location)
        except (OSError, TrackingError) as error:
            self._problem = str(error)

    def finish(self) -> str:
        """Waits at most `drain_s`, then kills the child.

        Returns:
            What went wrong, ending in the command that completes the mirror; empty if nothing did.
        """
        if self._child is not None:
            self._problem = self._wait(self._child)
            self._child = None
        if not self._problem:
            return ""
        return f"Tracking is incomplete: {self._problem} Complete it: {self._repair}"

    def _wait(self, child: subprocess.Popen[bytes]) -> str:
        assert child.stdin is not None
        # A byte, not only the end of the pipe: a forked process may still hold a copy of it.
        with suppress(OSError):
            child.stdin.write(b"\n")
            child.stdin.flush()
        with suppress(OSError):
            child.stdin.close()
        log = self._run / LOG_FILE
        try:
            code = child.wait(self._drain_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            problem = f"not all was written {self._drain_s:g} s after the end of the run."
            return f"{problem} {_last_line(log)}".strip()
        if code == 0:
            with suppress(OSError):
                if log.stat().st_size == 0:
                    log.unlink()
            return ""
        problem = _last_line(log) or f"the follower ended with status {code}."
        return f"{problem} Details: {log}."


def _spawn(run: Path, location: Location) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sia.tracking", "follow", str(run)]
    if location.artifacts is not None:
        command += ["--artifacts", location.artifacts]
    with (run / LOG_FILE).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=child_environment(location),
            start_new_session=True,
        )


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
