"""The runner: environments, cancelling, clean-up, and what happens when SIA itself is killed."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from hostile.stage import LIMITS, SANDBOXES, Remembering, Stage, make_task, why_not

from sia.errors import TargetError
from sia.records import Outcome
from sia.sandbox import Docker, Environments
from sia.sandbox.environments import COMPLETE, BuildFailed
from sia.sandbox.execution import marked
from sia.target import HarnessRunner
from sia.tasks.task import load_task

REASONS = {kind: why_not(kind) for kind in ("bwrap", "process")}


@pytest.fixture(params=["bwrap", "process"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    if REASONS[request.param]:
        pytest.skip(REASONS[request.param])
    sandbox = Remembering(SANDBOXES[request.param]())
    return Stage(task=make_task(tmp_path / "toy"), sandbox=sandbox, root=tmp_path)


def write_harness(stage: Stage, name: str, code: str, requirements: str | None = None) -> Path:
    folder = stage.root / "harnesses" / name
    folder.mkdir(parents=True)
    (folder / "target_agent.py").write_text(code)
    if requirements is not None:
        (folder / "requirements.txt").write_text(requirements)
    return folder


SUBMIT = "import os, sys; open(sys.argv[4] + '/submission.csv', 'w').write({})"
PREFIX = SUBMIT.format("sys.prefix")


class CountingEnvironments(Environments):
    """Counts builds, and takes its time."""

    builds: Sequence[Path] = ()

    def _build(
        self, folder: Path, requirements: Sequence[str], cancelled: Callable[[], bool]
    ) -> None:
        self.builds = [*self.builds, folder]
        super()._build(folder, requirements, cancelled)


def test_attempt_leaves_its_logs_its_submission_and_nothing_else(stage: Stage) -> None:
    attempt = stage.run("good")
    assert (attempt.candidate, attempt.outcome, attempt.reason) == ("good", Outcome.OK, "")
    assert (attempt.exit_code, attempt.trajectories) == (0, 0)
    assert sorted(path.name for path in stage.out("good").iterdir()) == [
        "stderr.log", "stdout.log", "submission", "usage.json",
    ]  # fmt: skip
    usage = json.loads((stage.out("good") / "usage.json").read_text())
    assert usage["sandbox"] == stage.sandbox.name
    assert 0 < usage["cpu_s"] < usage["wall_s"] * os.cpu_count()
    # The kernel starts a child's peak at that of the process that it is forked from.
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 4 < usage["max_rss_mib"] < ours + 100


def test_attempts_run_side_by_side(stage: Stage) -> None:
    runner = stage.runner()
    harness = stage.harness("good")
    with ThreadPoolExecutor(4) as pool:
        attempts = pool.map(
            lambda i: runner.run(f"c{i}", harness=harness, out=stage.out(f"c{i}"), deadline_s=30),
            range(8),
        )
        assert [attempt.outcome for attempt in attempts] == [Outcome.OK] * 8
    assert not stage.sandbox.alive()


def test_many_attempts_leave_no_descriptor_open(stage: Stage) -> None:
    stage.run("good")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("good", "submits_nothing", "fails_late"):
        stage.run(name)
    stage.run("loops", deadline_s=0.2)
    assert len(os.listdir("/proc/self/fd")) == before


def test_leavings_of_a_killed_try_are_removed_first(stage: Stage) -> None:
    out = stage.out("fails_late")
    for folder in ("work/closed", "inputs/data", "submission", "agent_execution"):
        (out / folder).mkdir(parents=True)
    (out / "submission" / "submission.csv").write_text("of an earlier try")
    (out / "work" / "closed").chmod(0)
    (out / "decision.json").write_text("not ours")
    assert stage.run("fails_late").outcome is Outcome.CRASHED
    assert sorted(path.name for path in out.iterdir()) == [
        "decision.json", "stderr.log", "stdout.log", "usage.json",
    ]  # fmt: skip


def test_data_of_the_exam_can_take_the_place_of_the_public_side(stage: Stage) -> None:
    data = stage.root / "exam"
    data.mkdir()
    (data / "only_here").touch()
    code = SUBMIT.format("str(os.listdir(sys.argv[2]))")
    runner = HarnessRunner(
        sandbox=stage.sandbox,
        environments=Environments(stage.root / "environments"),
        task=stage.task,
        limits=LIMITS,
        data=data,
    )
    harness = write_harness(stage, "lists", code)
    runner.run("lists", harness=harness, out=stage.out("lists"), deadline_s=30)
    assert stage.submitted("lists") == "['only_here']"


def test_harness_without_an_agent_is_a_crash(stage: Stage) -> None:
    empty = stage.root / "empty"
    empty.mkdir()
    attempt = stage.runner().run("c", harness=empty, out=stage.out("c"), deadline_s=30)
    assert attempt.outcome is Outcome.CRASHED
    assert "target_agent.py" in attempt.reason


def test_environment_is_built_once_for_two_runners_at_once(stage: Stage) -> None:
    requirements = "# nothing that would need a network\n"
    environments = [CountingEnvironments(stage.root / "environments") for _ in range(2)]
    runners = [
        HarnessRunner(sandbox=stage.sandbox, environments=each, task=stage.task, limits=LIMITS)
        for each in environments
    ]
    harnesses = [write_harness(stage, f"h{i}", PREFIX, requirements) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        attempts = list(
            pool.map(
                lambda i: runners[i].run(
                    f"h{i}", harness=harnesses[i], out=stage.out(f"h{i}"), deadline_s=30
                ),
                range(2),
            )
        )
    assert [attempt.reason for attempt in attempts] == ["", ""]
    [built] = [folder for each in environments for folder in each.builds]
    assert stage.submitted("h0") == stage.submitted("h1") == str(built)


def test_half_built_environment_is_built_again(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    environments = CountingEnvironments(tmp_path / "cache")
    runtime = environments.runtime(tmp_path)
    folder = runtime.python.parents[1]
    (folder / COMPLETE).unlink()
    (folder / "leftover").touch()
    assert environments.runtime(tmp_path) == runtime
    assert not (folder / "leftover").exists()
    environments.runtime(tmp_path)
    assert len(environments.builds) == 2


def test_package_that_cannot_be_installed_fails_the_attempt(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    harness = write_harness(stage, "needy", PREFIX, "no-such-package==1.0\n")
    attempt = stage.runner().run("c", harness=harness, out=stage.out("c"), deadline_s=30)
    assert attempt.outcome is Outcome.CRASHED
    assert "No matching distribution found for no-such-package==1.0" in attempt.reason
    assert "no-such-package" in (stage.out("c") / "stderr.log").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "-e .", "./local", "git+https://example.org/x.git", "x @ file:///etc", "--no-binary :all:",
        "-r /etc/passwd", "x==1 --config-settings a=b", "x==1; python_version>'3' --pre",
    ],
)  # fmt: skip
def test_requirements_that_would_run_code_outside_the_sandbox_are_refused(
    tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "requirements.txt").write_text(f"numpy==2.1  # fine\n{line}\n")
    with pytest.raises(BuildFailed, match="only packages by name"):
        Environments(tmp_path / "cache").runtime(tmp_path)


def test_link_out_of_the_data_is_reported_before_anything_runs(stage: Stage) -> None:
    (stage.root / "cached.csv").write_text("from a cache")
    (stage.task.public_dir / "linked.csv").symlink_to(stage.root / "cached.csv")
    if stage.sandbox.shields_data:
        with pytest.raises(TargetError, match="dvc checkout --relink"):
            stage.run("good")
    else:  # the copy holds the file itself
        assert stage.run("good").outcome is Outcome.OK


def test_sandbox_that_does_not_work_here_says_what_to_do(tmp_path: Path) -> None:
    if not Docker.available():
        pytest.skip("a Docker engine runs here")
    runner = HarnessRunner(
        sandbox=Docker(image="python:3.11-slim"),
        environments=Environments(tmp_path),
        task=make_task(tmp_path / "toy"),
        limits=LIMITS,
    )
    with pytest.raises(TargetError, match=r"sandbox=docker does not work here: .*docker info"):
        runner.run("c", harness=tmp_path, out=tmp_path / "out", deadline_s=30)


def run_and_cancel(stage: Stage, name: str, harness: Path, ready: Callable[[], bool]) -> None:
    runner = stage.runner()
    raised: list[BaseException] = []

    def target() -> None:
        try:
            runner.run(name, harness=harness, out=stage.out(name), deadline_s=60)
        except KeyboardInterrupt as interrupt:
            raised.append(interrupt)

    thread = threading.Thread(target=target)
    thread.start()
    wait_for(ready)
    runner.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert len(raised) == 1
    assert stage.sandbox.alive() == []
    assert not (stage.out(name) / "work").exists()
    with pytest.raises(KeyboardInterrupt):  # one that begins after the cancel does not escape it
        runner.run(name, harness=harness, out=stage.out(name), deadline_s=60)


def wait_for(condition: Callable[[], object], within_s: float = 20) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_cancel_kills_the_target_and_interrupts_the_run(stage: Stage) -> None:
    run_and_cancel(
        stage, "ignores_sigterm", stage.harness("ignores_sigterm"), lambda: stage.sandbox.alive()
    )
    assert stage.run("good").outcome is Outcome.OK


def test_cancel_ends_the_wait_for_an_environment(stage: Stage) -> None:
    harness = write_harness(stage, "waits", PREFIX, "# nothing\n")
    cache = stage.root / "environments"
    folder = Environments(cache).runtime(harness).python.parents[1]
    (folder / COMPLETE).unlink()
    with FileLock(cache / f"{folder.name}.lock"):
        run_and_cancel(stage, "waits", harness, lambda: stage.out("waits").exists())


SCRIPT = """
import pathlib, signal, sys
from hostile.stage import SANDBOXES, Remembering, Stage, make_task

class Announcing(Remembering):
    def launch(self, job):
        print(job.marker, flush=True)
        return super().launch(job)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
root = pathlib.Path(sys.argv[1])
sandbox = Announcing(SANDBOXES[sys.argv[2]]())
Stage(task=make_task(root / "toy2"), sandbox=sandbox, root=root).run("ignores_sigterm")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_target_outlives_sia(stage: Stage, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT, str(stage.root), stage.sandbox.name]
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        marker = script.stdout.readline().strip()
        wait_for(lambda: marked(marker))
        time.sleep(0.2)  # past the start of the interpreter
        script.send_signal(number)
        _, errors = script.communicate(timeout=20)
    assert script.returncode == -number
    wait_for(lambda: not marked(marker), within_s=5)
    assert ("KeyboardInterrupt" in errors) == (number is signal.SIGINT)


def with_source(stage: Stage, package: str) -> None:
    """Says in task.yaml that the raw data come from `package`."""
    path = stage.task.root / "task.yaml"
    text = path.read_text().replace("kind: generated", f"kind: wheel, package: {package}")
    path.write_text(text)
    stage.task = load_task(stage.task.root)


def test_a_package_with_the_answers_beside_the_interpreter_stops_the_run(stage: Stage) -> None:
    with_source(stage, "NumPy")
    with pytest.raises(TargetError, match="pip uninstall NumPy"):
        stage.runner().check()


def test_requirements_cannot_bring_the_package_with_the_answers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = stage.root / "index"
    index.mkdir()
    for name, needs in (("the_answers", ""), ("innocent", "Requires-Dist: the-answers\n")):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with_source(stage, "The.Answers")
    for name in ("the-answers", "innocent"):
        harness = write_harness(stage, name, PREFIX, f"{name}\n")
        attempt = stage.runner().run(name, harness=harness, out=stage.out(name), deadline_s=60)
        assert attempt.outcome is Outcome.CRASHED
        assert "brings 'The.Answers', which holds the answers" in attempt.reason
