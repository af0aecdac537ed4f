"""The commands that sandboxes build, and the small parts around them."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sia.errors import TargetError
from sia.sandbox import Bwrap, Docker, Process
from sia.sandbox.auto import auto
from sia.sandbox.collect import (
    Refused,
    collect_any,
    collect_submission,
    collect_trajectories,
    excess,
)
from sia.sandbox.environments import current_runtime
from sia.sandbox.execution import Output
from sia.sandbox.protocol import Job, Launch, Limits, Runtime

LIMITS = Limits(memory_mib=1000, processes=50, file_mib=10, threads=3)


def job(root: Path, *, slot: int = 0, runtime: Runtime | None = None) -> Job:
    for name in ("data", "harness", "work"):
        (root / name).mkdir(exist_ok=True)
    return Job(
        data=root / "data",
        code=root / "harness",
        work=root / "work",
        runtime=runtime or current_runtime(),
        limits=LIMITS,
        slot=slot,
        marker="abc",
    )


def launch_and_close(sandbox: Bwrap | Docker | Process, job: Job) -> Launch:
    launch = sandbox.launch(job)
    for fd in launch.pass_fds:
        os.close(fd)
    if launch.status_fd is not None:
        os.close(launch.status_fd)
    return launch


def options(launch: Launch) -> str:
    return " ".join(launch.argv)


def test_docker_command_shuts_the_container_off(tmp_path: Path) -> None:
    docker = Docker(image="example:1", cpus=1.5, tmp_mib=64)
    launch = launch_and_close(docker, job(tmp_path, slot=2))
    line = options(launch)
    for option in (
        "docker run --rm --init --name sia-abc --pull never",
        "--network none",
        "--read-only",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--pids-limit 50",
        "--memory 1000m --memory-swap 1000m",
        "--ulimit fsize=10485760 --ulimit core=0",
        "--log-driver none",
        "--cpus 1.5",
        "--tmpfs /tmp:rw,nosuid,nodev,size=64m,mode=1777",
        f"--mount type=bind,src={tmp_path}/data,dst=/sia/data,readonly",
        f"--mount type=bind,src={tmp_path}/harness,dst=/sia/harness,readonly",
        f"--mount type=bind,src={tmp_path}/work,dst=/sia/work --workdir",
        "--env OMP_NUM_THREADS=3",
    ):
        assert option in line
    assert line.endswith(
        "--entrypoint python example:1 /sia/harness/target_agent.py "
        "--dataset_dir /sia/data --working_dir /sia/work"
    )
    assert launch.stop == ("docker", "rm", "--force", "sia-abc")
    user = re.search(r"--user (\d+):", line)
    assert user
    assert int(user[1]) == (64102 if os.geteuid() == 0 else os.geteuid())


def test_docker_without_cpus_sets_no_limit(tmp_path: Path) -> None:
    launch = launch_and_close(Docker(image="example:1"), job(tmp_path))
    assert "--cpus" not in options(launch)


def test_docker_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert Docker.available() == "'docker' is not installed"
    with pytest.raises(TargetError, match="'docker' is not installed"):
        Docker(image="example:1").check()


@pytest.mark.parametrize("kind", [Bwrap, Process])
def test_no_sandbox_passes_the_environment_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Bwrap | Process]
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    launch = launch_and_close(kind(), job(tmp_path))
    assert "sk-secret" not in options(launch)
    assert "sk-secret" not in launch.env.values()


@pytest.mark.parametrize("kind", [Bwrap, Process])
def test_folders_of_programs_come_last_on_the_path_and_only_where_they_exist(
    tmp_path: Path, kind: type[Bwrap | Process]
) -> None:
    (tmp_path / "programs").mkdir()
    folders = (str(tmp_path / "absent"), str(tmp_path / "programs"))
    launch = launch_and_close(kind(programs=folders), job(tmp_path))
    line = options(launch)
    path = launch.env["PATH"] if kind is Process else line.split("--setenv PATH ")[1].split()[0]
    assert path.endswith(f":/usr/bin:/bin:{tmp_path / 'programs'}")
    assert str(tmp_path / "absent") not in line
    if kind is Bwrap:
        assert f"--ro-bind {tmp_path / 'programs'} {tmp_path / 'programs'}" in line


def test_bwrap_shows_nothing_of_the_host_but_what_is_listed(tmp_path: Path) -> None:
    argv = launch_and_close(Bwrap(tmp_mib=5), job(tmp_path)).argv
    assert "--unshare-net" in argv
    assert "--share-net" not in argv
    writable = [argv[i + 1 : i + 3] for i, word in enumerate(argv) if word == "--bind"]
    assert writable == [[str(tmp_path / "work"), "/sia/work"]]
    shown = {Path(argv[i + 1]) for i, word in enumerate(argv) if word == "--ro-bind"}
    for private in ("/", "/etc", "/home", "/root", "/var", "/usr", os.getcwd()):
        assert Path(private) not in shown
    size = argv.index(str(5 * 2**20))
    assert list(argv[size - 1 : size + 3]) == ["--size", str(5 * 2**20), "--tmpfs", "/tmp"]


def test_bwrap_shows_devices_that_a_job_names_and_no_others(tmp_path: Path) -> None:
    card = Path("/dev/nvidia0")
    assert "--dev-bind" not in options(launch_and_close(Bwrap(), job(tmp_path)))
    launch = launch_and_close(Bwrap(), replace(job(tmp_path), devices=(card,)))
    assert f"--dev /dev --dev-bind {card} {card}" in options(launch)


def test_bwrap_refuses_a_task_inside_the_interpreter(tmp_path: Path) -> None:
    inside = tmp_path / "venv" / "lib" / "task"
    inside.mkdir(parents=True)
    runtime = Runtime(python=tmp_path / "venv/bin/python", roots=(tmp_path / "venv" / "lib",))
    with pytest.raises(TargetError, match=r"every target can read.*task\.dir="):
        Bwrap().launch(job(inside, runtime=runtime))


def test_bwrap_that_is_not_installed_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TargetError, match="apt install bubblewrap"):
        Bwrap().check()


def test_auto_explains_what_it_could_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox = auto(image="example:1")
    assert sandbox.name == "process"
    assert "apt install bubblewrap" in sandbox.protects
    assert "'docker' is not installed" in sandbox.protects
    assert "\n" not in sandbox.protects
    with pytest.raises(TargetError, match="apt install util-linux"):
        sandbox.check()


def test_interpreter_is_shown_in_parts_and_never_with_its_whole_prefix() -> None:
    roots = current_runtime().roots
    assert {path.name for path in roots} & {"lib", "bin"}
    assert len(set(roots)) == len(roots)
    assert Path(sys.prefix) not in roots


def test_output_keeps_both_ends_and_counts_the_rest() -> None:
    output = Output(cap=8)
    for chunk in (b"ab", b"cdefgh", b"ijkl"):
        output.add(chunk)
    assert output.text() == "abcd\n[...]\nijkl\n[4 bytes were dropped where [...] stands]\n"


def test_output_within_its_cap_is_kept_as_it_is() -> None:
    output = Output(cap=8)
    output.add(b"abc\n")
    output.add(b"\xffe\n\n")
    assert output.text() == "abc\n\ufffde\n\n"
    assert output.last_line() == "\ufffde"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def collect(work: Path, *files: str, max_mib: float = 1) -> Path:
    out = work.parent / "submission"
    fd = os.open(work, os.O_RDONLY)
    try:
        collect_submission(fd, files, max_mib=max_mib, out=out)
    finally:
        os.close(fd)
    return out


def test_submission_may_lie_in_folders(work: Path) -> None:
    (work / "a/b").mkdir(parents=True)
    (work / "a/b/x.csv").write_text("x")
    (work / "y.csv").write_text("y")
    out = collect(work, "a/b/x.csv", "y.csv")
    assert (out / "a/b/x.csv").read_text() == "x"


def test_of_several_patterns_the_first_that_matches_gives_one_file(work: Path) -> None:
    (work / "results").mkdir()
    for name in ("results.json", "output2.json", "output1.json"):
        (work / name).write_text(name)
    patterns = ("submission.csv", "results/*.json", "output*.json")
    out = work.parent / "submission"
    fd = os.open(work, os.O_RDONLY)
    try:
        collect_any(fd, patterns, max_mib=1, out=out)
        assert [path.name for path in out.iterdir()] == ["output2.json"]
        (work / "results" / "a.json").write_text("a")
        collect_any(fd, patterns, max_mib=1, out=work.parent / "second")
        assert (work.parent / "second/results/a.json").read_text() == "a"
        (work / "submission.csv").symlink_to("/etc/hostname")
        with pytest.raises(Refused, match=r"submission\.csv is a symbolic link"):
            collect_any(fd, patterns, max_mib=1, out=work.parent / "third")
        with pytest.raises(Refused, match=r"none of \*\.txt in the working folder"):
            collect_any(fd, ["*.txt"], max_mib=1, out=work.parent / "fourth")
    finally:
        os.close(fd)


def test_folder_on_the_way_may_not_be_a_link(work: Path) -> None:
    (work.parent / "outside").mkdir()
    (work.parent / "outside/x.csv").write_text("secret")
    (work / "a").symlink_to(work.parent / "outside")
    with pytest.raises(Refused, match=r"a/x\.csv cannot be opened"):
        collect(work, "a/x.csv")


def test_size_counts_for_all_files_together(work: Path) -> None:
    for name in ("a", "b"):
        (work / name).write_bytes(b"x" * 600)
    with pytest.raises(Refused, match="b is too large: 424 bytes are allowed, it has 600"):
        collect(work, "a", "b", max_mib=1 / 1024)


def test_trajectories_are_bounded_and_named(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sia.sandbox.collect.MAX_TRAJECTORIES", 3)
    (work / "agent_execution").mkdir()
    for name in ("execution_q1.json", "execution_q2.json", "execution_q3.json", "other.json"):
        (work / "agent_execution" / name).write_text("[]")
    fd = os.open(work, os.O_RDONLY)
    try:
        assert collect_trajectories(fd, work.parent / "taken") == 2
    finally:
        os.close(fd)
    assert sorted(path.name for path in (work.parent / "taken").iterdir()) == [
        "execution_q1.json", "execution_q2.json",
    ]  # fmt: skip


def test_number_of_files_is_bounded(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sia.sandbox.collect.MAX_ENTRIES", 5)
    for number in range(6):
        (work / str(number)).touch()
    assert excess(work, max_mib=1) == "made more than 5 files"


def test_sparse_files_count_by_what_they_hold(work: Path) -> None:
    with (work / "sparse").open("wb") as file:
        file.truncate(2**30)
    assert excess(work, max_mib=1) == ""
