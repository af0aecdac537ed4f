"""Hostile targets: each ends with the right outcome, harms nothing, and leaves nothing behind."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hostile.stage import LABEL, LIMITS, SANDBOXES, Remembering, Stage, make_task, why_not

from sia.records import Attempt, Outcome
from sia.sandbox.environments import current_runtime
from sia.sandbox.execution import Cancel, execute
from sia.sandbox.protocol import Job
from sia.sandbox.seccomp import filter_bytes

SECRET = "sk-the-secret-of-the-parent"
REASONS = {kind: why_not(kind) for kind in SANDBOXES}


def stage_for(kind: str, root: Path) -> Stage:
    if REASONS[kind]:
        pytest.skip(REASONS[kind])
    return Stage(task=make_task(root / "toy"), sandbox=Remembering(SANDBOXES[kind]()), root=root)


@pytest.fixture(params=["bwrap", "process"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    """Afterwards no process of any attempt is alive, and a good target still runs."""
    stage = stage_for(request.param, tmp_path)
    yield stage
    check_aftermath(stage)


@pytest.fixture(params=["bwrap", "bwrap-userns"])
def confined(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    stage = stage_for(request.param, tmp_path)
    yield stage
    check_aftermath(stage)


def check_aftermath(stage: Stage) -> None:
    assert stage.sandbox.alive() == []
    assert stage.run("good").outcome is Outcome.OK
    for out in (stage.root / "attempts").iterdir():
        assert not (out / "work").exists()
        assert not (out / "inputs").exists()


@pytest.fixture
def hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What a spy is told: where the labels are, and a server on the loopback interface."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    host_file = tmp_path / "host_file"
    host_file.write_text("a file of the host")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        abstract = f"sia-test-{os.getpid()}"
        unix.bind(f"\0{abstract}")
        unix.listen()
        threading.Thread(target=greet, args=(server,), daemon=True).start()
        yield {
            "label": str(tmp_path / "toy/data/private/dev/labels.csv"),
            "host_file": str(host_file),
            "port": server.getsockname()[1],
            "abstract": abstract,
            "secret": SECRET,
        }


def greet(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the test is over
            return
        with connection:
            connection.sendall(b"hello")


def tell(stage: Stage, hints: dict[str, object]) -> None:
    (stage.task.public_dir / "hints.json").write_text(json.dumps(hints))


def expect(attempt: Attempt, outcome: Outcome, reason: str = "") -> None:
    assert attempt.outcome is outcome, attempt
    assert reason in attempt.reason
    assert "\n" not in attempt.reason


def test_endless_target_is_ended_at_its_deadline(stage: Stage) -> None:
    attempt = stage.run("loops", deadline_s=0.7)
    expect(attempt, Outcome.TIMEOUT, "ran longer than 0.7 s")
    assert (stage.out("loops") / "stdout.log").read_text() == "before the loop\n"
    assert 0.7 < json.loads((stage.out("loops") / "usage.json").read_text())["wall_s"] < 5


def test_target_that_ignores_sigterm_is_killed(stage: Stage) -> None:
    attempt = stage.run("ignores_sigterm", deadline_s=0.5)
    expect(attempt, Outcome.TIMEOUT)
    assert attempt.exit_code == -9


def test_grandchild_dies_with_the_attempt(stage: Stage) -> None:
    expect(stage.run("leaves_grandchild"), Outcome.OK)
    assert json.loads((stage.out("leaves_grandchild") / "usage.json").read_text())["wall_s"] < 5


def test_memory_beyond_the_limit_crashes_the_target_alone(stage: Stage) -> None:
    expect(stage.run("allocates"), Outcome.CRASHED, "exit code 1: MemoryError")


def test_flood_of_output_is_cut_and_does_not_block(stage: Stage) -> None:
    expect(stage.run("floods"), Outcome.OK)
    log = (stage.out("floods") / "stdout.log").read_text()
    assert len(log) < (LIMITS.output_kib + 1) * 1024
    assert "last words" in log
    dropped = 100_000_000 + len("last words\n") - LIMITS.output_kib * 1024
    assert log.splitlines()[-1] == f"[{dropped} bytes were dropped where [...] stands]"


def test_output_that_is_not_text_is_logged_with_replacements(stage: Stage) -> None:
    expect(stage.run("prints_binary"), Outcome.OK)
    assert "\ufffd" in (stage.out("prints_binary") / "stdout.log").read_text(encoding="utf-8")


def test_score_written_by_the_target_is_not_taken(stage: Stage) -> None:
    expect(stage.run("scores_itself"), Outcome.NO_SUBMISSION)
    assert sorted(path.name for path in stage.out("scores_itself").iterdir()) == [
        "stderr.log", "stdout.log", "usage.json",
    ]  # fmt: skip


def test_deleted_working_folder_is_no_submission(stage: Stage) -> None:
    expect(stage.run("deletes_folder"), Outcome.NO_SUBMISSION, "no submission.csv")


@pytest.mark.parametrize("name", ["links_out", "links_folder_out"])
def test_link_to_a_host_file_is_not_followed(
    stage: Stage, hints: dict[str, object], name: str
) -> None:
    tell(stage, hints)
    attempt = stage.run(name)
    expect(attempt, Outcome.NO_SUBMISSION, "submission.csv")
    assert attempt.trajectories == 0
    left = [path for path in stage.out(name).rglob("*") if path.is_file()]
    assert not [path for path in left if LABEL in path.read_text() or "root:" in path.read_text()]


def test_pipe_is_refused_without_waiting_for_a_writer(stage: Stage) -> None:
    expect(stage.run("makes_pipe"), Outcome.NO_SUBMISSION, "submission.csv is not a regular file")


def test_success_without_a_submission_is_a_failure(stage: Stage) -> None:
    attempt = stage.run("submits_nothing")
    expect(attempt, Outcome.NO_SUBMISSION, "no submission.csv in the working folder")
    assert attempt.exit_code == 0


def test_submission_beyond_its_size_is_refused(stage: Stage) -> None:
    expect(stage.run("submits_too_much"), Outcome.NO_SUBMISSION, "submission.csv is too large")


def test_crash_after_the_submission_is_a_crash(stage: Stage) -> None:
    attempt = stage.run("fails_late")
    expect(attempt, Outcome.CRASHED, "exit code 1: RuntimeError: too late")
    assert not (stage.out("fails_late") / "submission").exists()


def test_death_from_a_signal_is_named(stage: Stage) -> None:
    attempt = stage.run("kills_itself")
    expect(attempt, Outcome.CRASHED, "killed by SIGKILL (memory?)")
    assert attempt.exit_code == -9


def skip_where_processes_are_not_limited(stage: Stage) -> None:
    if stage.sandbox.name == "process" and os.geteuid() == 0:
        pytest.skip("the process limit does not bind root in the process sandbox")


def test_number_of_processes_is_limited(stage: Stage) -> None:
    skip_where_processes_are_not_limited(stage)
    expect(stage.run("counts_forks"), Outcome.OK)
    assert int(stage.submitted("counts_forks")) < LIMITS.processes


def test_fork_bomb_ends_at_its_deadline(stage: Stage) -> None:
    skip_where_processes_are_not_limited(stage)
    expect(stage.run("fork_bomb", deadline_s=1), Outcome.TIMEOUT)


def test_filling_the_disk_ends_the_attempt(stage: Stage) -> None:
    expect(stage.run("fills_disk"), Outcome.DISK_LIMIT, "wrote more than 32 MiB")


def test_size_of_one_file_is_limited(stage: Stage) -> None:
    expect(stage.run("writes_huge_file"), Outcome.CRASHED, "File too large")


def test_folders_closed_to_everybody_are_removed(stage: Stage) -> None:
    expect(stage.run("closes_folders"), Outcome.OK)


def test_folders_too_deep_for_a_path_are_removed(stage: Stage) -> None:
    expect(stage.run("nests_deep"), Outcome.DISK_LIMIT, "deeper than 100 levels")


def test_data_and_harness_stay_as_they_are(stage: Stage) -> None:
    harness = stage.harness("vandal")
    before = {path: path.read_bytes() for path in files(harness, stage.task.root)}
    expect(stage.run("vandal"), Outcome.OK)
    assert {path: path.read_bytes() for path in files(harness, stage.task.root)} == before
    if stage.sandbox.name == "bwrap":
        assert set(stage.submitted("vandal").split()) == {"refused"}


def files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_secret_of_the_parent_is_not_in_the_environment(
    stage: Stage, hints: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    tell(stage, hints)
    expect(stage.run("spy"), Outcome.OK)
    environment = json.loads(stage.submitted("spy"))["environment"]
    assert SECRET not in environment.values()
    assert environment["OPENBLAS_CORETYPE"] == "Haswell"
    assert environment["OPENBLAS_NUM_THREADS"] == str(LIMITS.threads)
    assert not [name for name in environment if name in os.environ and name not in (
        "HOME", "LANG", "LOGNAME", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE",
        "OPENBLAS_NUM_THREADS", "PATH", "PWD", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED",
        "PYTHONUNBUFFERED", "TMPDIR", "USER",
    )]  # fmt: skip


def test_bwrap_hides_labels_files_processes_and_the_network(
    confined: Stage, hints: dict[str, object]
) -> None:
    tell(confined, hints)
    expect(confined.run("spy"), Outcome.OK)
    seen = json.loads(confined.submitted("spy"))
    assert seen["files"] == []
    assert seen["processes"] == []
    assert seen["network"] == []
    assert seen["uid"] >= 64100
    assert seen["descriptors"] == ["0", "1", "2", "3"]  # 3 is the listing itself


def test_process_sandbox_says_what_the_spy_can_see(
    tmp_path: Path, hints: dict[str, object]
) -> None:
    stage = stage_for("process", tmp_path)
    tell(stage, hints)
    stage.run("spy")
    seen = json.loads(stage.submitted("spy"))
    assert seen["files"]
    assert seen["network"]
    for word in ("NOT protected", "labels", "network"):
        assert word in stage.sandbox.protects


@pytest.mark.skipif(filter_bytes() is None, reason="libseccomp is not installed")
def test_bwrap_cannot_be_rearranged_from_inside(confined: Stage) -> None:
    expect(confined.run("breaks_out"), Outcome.OK)
    assert json.loads(confined.submitted("breaks_out")) == []


DRIVER = """
import ctypes, os, sys
ctypes.CDLL("libdriver.so.1")
open("/dev/null", "w").write("x")
open("/proc/self/comm", "w").write("a name")
kernel = [name for name in os.listdir("/proc") if not name.isdigit() and "self" not in name]
places = [f"/proc/{name}" for name in kernel if name not in ("net", "mounts")]
walks = [walk for place in places for walk in os.walk(place)]
places = [os.path.join(folder, name) for folder, _, names in walks for name in names]
places += [f"/proc/{name}" for name in kernel if os.path.isfile(f"/proc/{name}")]
assert "/proc/sys/kernel/core_pattern" in places
for place in places:
    try:
        os.close(os.open(place, os.O_WRONLY))
    except OSError:
        pass
    else:
        sys.exit(place + " can be written to")
"""


@pytest.mark.parametrize("kind", ["bwrap", "bwrap-userns"])
def test_a_driver_finds_its_library_and_may_name_its_threads(kind: str, tmp_path: Path) -> None:
    """What a GPU's driver needs, asked for with a device and a library that every machine has."""
    sandbox = stage_for(kind, tmp_path).sandbox
    for name in ("data", "code", "work", "driver"):
        (tmp_path / name).mkdir()
    (tmp_path / "code" / "target_agent.py").write_text(DRIVER)
    (extension,) = Path(msgspec.__file__).parent.glob("_core*.so")
    shutil.copyfile(extension, tmp_path / "driver" / "libdriver.so.1")
    job = Job(
        data=tmp_path / "data", code=tmp_path / "code", work=tmp_path / "work",
        runtime=current_runtime(), limits=LIMITS, slot=0, marker="a-driver",
        devices=(Path("/dev/null"),), libraries=(tmp_path / "driver",),
    )  # fmt: skip
    execution = execute(sandbox.launch(job), job, deadline_s=20, cancel=Cancel())
    assert execution.outcome is Outcome.OK, execution.stderr.text()


def test_trajectories_are_taken_and_nothing_else(stage: Stage) -> None:
    assert stage.run("leaves_trajectories").trajectories == 3
    assert sorted(
        path.name for path in (stage.out("leaves_trajectories") / "agent_execution").iterdir()
    ) == ["agent_execution.json", "execution_q1.json", "execution_q2.json"]
