"""Runs the tests of a Harbor task under bubblewrap, at the paths that they expect.

<workdir>        the files of the start with what the target left laid over them
/tests           tests/
/logs/verifier   where the tests leave reward.txt or reward.json
"""

import json
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from sia.records import Outcome
from sia.sandbox import Bwrap
from sia.sandbox.environments import current_runtime
from sia.sandbox.execution import Cancel, Execution, execute, free_slot
from sia.sandbox.protocol import Job, Limits
from sia.tasks.harbor import SETTINGS_FILE, START, Settings

MEMORY_MIB = 8192
LOG_FILE = "tests.log"  # beside the tests
REPORT = "sia-report "
# Inside the sandbox. The folder of logs is private to it; the report tells what was left there.
RUNNER = """
import json, os, pathlib, subprocess, sys
settings = json.loads(pathlib.Path(__file__).with_name("run.json").read_text())
logs = pathlib.Path("/tmp/logs/verifier")
logs.mkdir(parents=True)
env = {**os.environ, **settings["env"]}
code = subprocess.run(settings["command"], cwd=settings["workdir"], env=env).returncode
def left(name):
    path = logs / name
    return path.read_text(errors="replace")[:10000] if path.is_file() else None
sys.stdout.flush()
print(REPORT + json.dumps({"code": code, "text": left("reward.txt"), "json": left("reward.json")}))
""".replace("REPORT", repr(REPORT))


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """The reward of one submission; the contract is that of a `verify.py`.

    Raises:
        RuntimeError: The tests gave no reward.
        TargetError: bubblewrap does not work here.
    """
    labels_dir = labels_dir.resolve()
    settings = _settings(labels_dir)
    with tempfile.TemporaryDirectory(prefix="sia-harbor-") as folder:
        app = Path(folder) / "app"
        _start(labels_dir, app)
        shutil.copytree(submission_dir, app, dirs_exist_ok=True)
        command = ["bash", "/tests/test.sh"]
        if not settings.script:
            command = ["python", "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "/tests"]
        done = _run(settings, labels_dir / "tests", "/tests", command, app, Path(folder))
    reward = _reward(done, script=settings.script, log=labels_dir / LOG_FILE)
    return {
        "score": reward,
        "n_items": 1,
        "n_answered": 1,
        "metrics": {"reward": reward},
        "symptoms": {"error_share": 1 - reward},
        "items": {"task": reward},
    }


def solve(labels_dir: Path, submission_dir: Path) -> None:
    """Runs the task's own solution and leaves what it made in `submission_dir`.

    Raises:
        RuntimeError: It fails.
    """
    labels_dir = labels_dir.resolve()
    settings = _settings(labels_dir)
    with tempfile.TemporaryDirectory(prefix="sia-harbor-") as folder:
        app = Path(folder) / "app"
        _start(labels_dir, app)
        command = ["bash", "/solution/solve.sh"]
        done = _run(settings, labels_dir / "solution", "/solution", command, app, Path(folder))
        said = done.stderr.last_line() or done.stdout.last_line()
        if (code := _report(done, said)["code"]) != 0:
            raise RuntimeError(f"solution/solve.sh ended with exit code {code}: {said}")
        shutil.copytree(app, submission_dir, dirs_exist_ok=True)


def _settings(labels_dir: Path) -> Settings:
    return msgspec.json.decode((labels_dir / SETTINGS_FILE).read_bytes(), type=Settings)


def _start(labels_dir: Path, app: Path) -> None:
    """The working folder as the task begins."""
    shutil.copytree(labels_dir.parents[1] / "public" / START, app)


def _run(
    settings: Settings, folder: Path, place: str, command: list[str], app: Path, scratch: Path
) -> Execution:
    sandbox = Bwrap()
    sandbox.check()
    code, data = scratch / "code", scratch / "data"
    data.mkdir()
    shutil.copytree(folder, code / "given")
    (code / "run.py").write_text(RUNNER, encoding="utf-8")
    given = {"workdir": settings.workdir, "command": command, "env": settings.env}
    (code / "run.json").write_text(json.dumps(given), encoding="utf-8")
    for path in app.rglob("*"):  # the sandbox's user owns the folder, not what is in it
        path.chmod(0o777 if path.is_dir() else path.stat().st_mode | 0o666)
    with free_slot() as slot:
        job = Job(
            data=data,
            code=code,
            work=app,
            runtime=current_runtime(),
            limits=Limits(memory_mib=MEMORY_MIB),
            slot=slot,
            marker=secrets.token_hex(8),
            entry="run.py",
            links={
                settings.workdir: "/sia/work",
                place: "/sia/harness/given",
                "/logs": "/tmp/logs",
            },
        )
        cancel = Cancel()
        try:
            launch = sandbox.launch(job)
            return execute(launch, job, deadline_s=settings.timeout_s, cancel=cancel)
        finally:
            cancel.close()


def _reward(done: Execution, *, script: bool, log: Path) -> float:
    # The tests' own words go to a private file and not into the message, which the meta backend
    # may read.
    log.write_text(f"{done.stdout.text()}\n{done.stderr.text()}", encoding="utf-8")
    report = _report(done, f"see {log}")
    for text in (report["text"], report["json"]):
        if text is None:
            continue
        try:
            found = json.loads(text)
        except ValueError:
            raise RuntimeError(f"the tests left a reward that is no number; see {log}") from None
        if isinstance(found, dict):
            found = found.get("reward", next(iter(found.values()), None))
        if not isinstance(found, int | float) or not 0 <= found <= 1:
            raise RuntimeError(f"the tests left a reward that is not from 0 to 1; see {log}")
        return float(found)
    if not script and report["code"] not in (0, 1):
        raise RuntimeError(f"pytest ended with exit code {report['code']}; see {log}")
    return 1.0 if report["code"] == 0 else 0.0


def _report(done: Execution, hint: str) -> dict[str, Any]:
    if done.outcome is Outcome.TIMEOUT:
        raise RuntimeError(f"the tests {done.reason}")
    for line in reversed(done.stdout.text().splitlines()):
        if line.startswith(REPORT):
            report: dict[str, Any] = json.loads(line.removeprefix(REPORT))
            return report
    raise RuntimeError(f"the tests could not be run; {hint}")
