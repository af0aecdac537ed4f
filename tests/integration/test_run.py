"""`python -m sia` as a user runs it: records, resume, interruption, and mistakes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sia import rundir
from sia.records import Outcome

QUICK = ["task=toy", "tracking=none", "sandbox=process"]
Sia = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sia(tmp_path: Path) -> Sia:
    """Runs `python -m sia` in a folder of its own; the run lands in `run` unless told otherwise."""

    def run(*args: str, folder: str = "run", **options: object) -> subprocess.CompletedProcess[str]:
        place = (
            []
            if any(a.startswith(("resume=", "hydra.")) or a == "-m" for a in args)
            else [f"hydra.run.dir={folder}"]
        )
        return subprocess.run(
            [sys.executable, "-m", "sia", *args, *place],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            check=False,
            **options,  # type: ignore[call-overload]
        )

    return run


def start(tmp_path: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sia", *args],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result(run: Path) -> rundir.RunResult:
    found = rundir.read_result(run)
    assert found is not None
    return found


def outcomes(run: Path) -> list[str]:
    records = rundir.records(run)
    return [record["outcome"] for key, record in records.items() if key.endswith("/attempt")]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_for_growth(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the process has added a line to the journal."""
    before = len(rundir.read_journal(run))
    wait_for(lambda: len(rundir.read_journal(run)) > before or process.poll() is not None)


def test_a_run_improves_the_target_and_leaves_its_records(sia: Sia, tmp_path: Path) -> None:
    done = sia(*QUICK, "generations=4")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    found = result(run)
    assert found.status == "finished"
    assert found.best == "g001-c0"
    assert found.best_score is not None
    assert found.best_score > 0.95
    assert found.generations == 4
    first = run / "gen-001" / "cand-0"
    assert "threshold: 0.4" in (first / "harness" / "harness.yaml").read_text()
    assert "+threshold: 0.4" in (first / "harness.diff").read_text()
    assert "Large numbers are missed" in (first / "improvement.md").read_text()
    assert (first / "submission" / "submission.csv").is_file()
    info = rundir.read_info(run)
    assert info.meta == "optuna"
    assert info.provenance["sandbox"] == "process"
    assert "resume" not in (run / "config.yaml").read_text()


def parents(run: Path) -> list[set[str]]:
    """The parents of each generation after the first."""
    found: dict[int, set[str]] = {}
    for key, record in rundir.records(run).items():
        if key.endswith("/candidate") and record["generation"] > 0:
            found.setdefault(record["generation"], set()).add(record["parent"])
    return [found[generation] for generation in sorted(found)]


@pytest.mark.parametrize("search", ["best_of_n", "archive", "puct"])
def test_the_same_seed_makes_the_same_records_with_one_worker_or_two(
    sia: Sia, tmp_path: Path, search: str
) -> None:
    args = [*QUICK, f"search={search}", "search.candidates=3", "generations=4"]
    assert sia(*args, "workers=1", folder="one").returncode == 0
    assert sia(*args, "workers=2", folder="two").returncode == 0
    assert sia(*args, "workers=1", "seed=1", folder="other").returncode == 0
    one, two = rundir.records(tmp_path / "one"), rundir.records(tmp_path / "two")
    assert one == two
    assert len(one) == 4 + 3 + 10 * 3  # generations, decisions; candidates, attempts, evaluations
    assert one != rundir.records(tmp_path / "other")
    several = any(len(named) > 1 for named in parents(tmp_path / "one"))
    assert several == (search != "best_of_n")


@pytest.mark.parametrize(("search", "kills"), [("best_of_n", 5), ("archive", 3), ("puct", 3)])
def test_kills_at_random_moments_change_no_record_and_repeat_no_step(
    sia: Sia, tmp_path: Path, search: str, kills: int
) -> None:
    args = [*QUICK, f"search={search}", "search.candidates=2", "workers=2", "generations=16"]
    assert sia(*args, folder="unbroken").returncode == 0
    rng = random.Random(0)
    broken = tmp_path / "broken"
    process = start(tmp_path, *args, f"hydra.run.dir={broken}")
    wait_for((broken / "journal.jsonl").exists)
    for _ in range(kills):
        wait_for_growth(broken, process)
        time.sleep(rng.uniform(0, 0.25))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        process = start(tmp_path, f"resume={broken}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert rundir.records(broken) == rundir.records(tmp_path / "unbroken")
    keys = Counter(line.key for line in rundir.read_journal(broken))
    assert set(keys.values()) == {1}
    assert result(broken).status == "finished"


def test_ctrl_c_writes_everything_and_the_run_can_be_resumed(sia: Sia, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(tmp_path, *QUICK, "generations=40", f"hydra.run.dir={run}")
    wait_for(lambda: (run / "gen-002").exists())
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "resume=" in output
    assert result(run).status == "interrupted"
    before = len(rundir.read_journal(run))
    assert sia(f"resume={run}", "generations=5").returncode == 0
    assert result(run).status == "finished"
    assert len(rundir.read_journal(run)) > before


def test_ctrl_c_kills_a_target_that_would_not_end(sia: Sia, tmp_path: Path) -> None:
    mark, run = tmp_path / "alive", tmp_path / "run"
    harness = hostile(
        tmp_path,
        f"import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'started')!r}, 'w')\ntime.sleep(4)\nopen({str(mark)!r}, 'w')\n",
    )
    process = start(tmp_path, *QUICK, f"target.harness={harness}", f"hydra.run.dir={run}")
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    time.sleep(4)
    assert not mark.exists()
    assert outcomes(run) == []


def hostile(tmp_path: Path, code: str) -> Path:
    folder = tmp_path / "hostile"
    shutil.copytree(Path(__file__).parents[2] / "tasks" / "toy" / "harness", folder)
    (folder / "target_agent.py").write_text(code)
    return folder


GOOD = Path(__file__).parents[2] / "tasks" / "toy" / "harness" / "target_agent.py"
ENDS = {
    "1 / 0": "crashed",
    "import time; time.sleep(60)": "timeout",
    "print('no submission')": "no_submission",
    "import os; os.kill(os.getpid(), 9)": "crashed",
    "open(__import__('sys').argv[4] + '/submission.csv', 'wb').write(b'\\xff')": "bad_submission",
    "x = bytearray(50 * 2**30)": "crashed",
    "def broken(:": "bad_proposal",
}


def test_a_bad_candidate_is_counted_and_the_run_goes_on(sia: Sia, tmp_path: Path) -> None:
    """One bad harness per generation, each followed by the next; the incumbent stays."""
    steps = [{"files": {"target_agent.py": code + "\n"}} for code in ENDS]
    steps += [{"fail": "nothing to say"}, {}, {"set": {"threshold": 0.37}}]
    (tmp_path / "script.json").write_text(json.dumps(steps))
    done = sia(
        *QUICK, "meta=scripted", "meta.script=script.json", "target.attempt_s=2",
        f"generations={len(steps) + 1}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    found = result(run)
    records = rundir.records(run)
    seen = []
    for generation in range(1, len(steps) + 1):
        evaluation = records.get(f"{generation:04}/0/evaluation", {"outcome": "ok"})
        attempt = records.get(f"{generation:04}/0/attempt", {"outcome": ""})
        candidate = records[f"{generation:04}/0/candidate"]
        if candidate["problem"]:
            seen.append("bad_proposal")
        elif candidate["duplicate_of"]:
            seen.append("duplicate")
        else:
            seen.append(evaluation["outcome"] if attempt["outcome"] == "ok" else attempt["outcome"])
    assert seen == [*ENDS.values(), "bad_proposal", "duplicate", "ok"]
    assert found.best == f"g{len(steps):03}-c0"
    assert found.best_score == 1.0
    assert found.failures == dict(Counter(seen) - Counter(["ok"]))
    assert all(records[f"{g:04}/generation"]["incumbent"] == "g000-c0" for g in range(len(steps)))


def test_a_run_without_any_scored_attempt_ends_with_1_and_says_why(
    sia: Sia, tmp_path: Path
) -> None:
    harness = hostile(tmp_path, "1 / 0\n")
    done = sia(*QUICK, f"target.harness={harness}", "meta=scripted", "generations=3")
    assert done.returncode == 1
    assert "No attempt was scored in 3 generations (crashed: 3)" in done.stderr
    assert result(tmp_path / "run").status == "failed"


def test_a_replay_repeats_the_records_of_a_run(sia: Sia, tmp_path: Path) -> None:
    assert sia(*QUICK, "generations=4", folder="first").returncode == 0
    done = sia(*QUICK, "generations=4", "meta=replay", "meta.run=first", folder="second")
    assert done.returncode == 0, done.stderr
    assert rundir.records(tmp_path / "second") == rundir.records(tmp_path / "first")
    harness = tmp_path / "first" / "gen-001" / "cand-0" / "harness" / "harness.yaml"
    harness.write_text("threshold: 0.37\n")
    done = sia(*QUICK, "generations=4", "meta=replay", "meta.run=first", folder="third")
    assert done.returncode == 2
    assert "is not what was recorded" in done.stderr


def test_recorded_runs_are_compared_again_and_only_with_their_own_search(
    sia: Sia, tmp_path: Path
) -> None:
    recorded = [*QUICK, "search=puct", "generations=3"]
    assert sia(*recorded, folder="optuna").returncode == 0
    assert sia(*recorded, "meta=scripted", folder="scripted").returncode == 0
    again = ("-m", "experiment=meta_comparison", "meta.run=optuna,scripted", "hydra.sweep.dir=both")
    done = sia(*again, *recorded)
    assert done.returncode == 0, done.stderr
    for number, name in enumerate(("optuna", "scripted")):
        expected = rundir.records(tmp_path / name)
        assert rundir.records(tmp_path / "both" / str(number)) == expected
        assert "0002/1/evaluation" in expected
    for search, difference in (
        ("chain", "optuna has g001-c0, g001-c1, not g001-c0: to be replayed, it needs the task"),
        ("archive", "not g00"),
    ):
        args = (*QUICK, "generations=3", "meta=replay", "meta.run=optuna", f"search={search}")
        other = sia(*args, folder=search)
        assert other.returncode == 2, search
        assert difference in other.stderr


def test_a_time_budget_ends_the_run_cleanly(sia: Sia, tmp_path: Path) -> None:
    done = sia(*QUICK, "generations=500", "meta=scripted", "budget.wall_s=2")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert "budget.wall_s=2" in found.reason
    assert "stopped   budget: budget.wall_s=2 is used up" in done.stdout
    assert 1 <= found.generations < 500
    assert outcomes(tmp_path / "run").count(Outcome.TIMEOUT) == 0
    assert sia("resume=run").returncode == 0
    assert result(tmp_path / "run").generations == found.generations
    assert sia("resume=run", "budget.wall_s=3").returncode == 0
    assert result(tmp_path / "run").generations > found.generations


def test_two_runs_started_in_the_same_second_do_not_meet(tmp_path: Path) -> None:
    both = [start(tmp_path, *QUICK, "generations=2") for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0] * 4, outputs
    assert len(list((tmp_path / "runs" / "toy" / "optuna").iterdir())) == 4


def test_two_runs_cannot_share_a_directory(sia: Sia, tmp_path: Path) -> None:
    assert sia(*QUICK, "generations=1").returncode == 0
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    done = sia(*QUICK, "generations=1")
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_a_resumed_run_may_go_further_but_not_become_another(sia: Sia, tmp_path: Path) -> None:
    assert sia(*QUICK, "generations=2").returncode == 0
    done = sia("resume=run", "seed=5", "meta=scripted")
    assert done.returncode == 2
    assert "seed=5 contradicts the record" in done.stderr
    assert "meta=scripted contradicts the record" in done.stderr
    assert sia("resume=run", *QUICK, "generations=4", "workers=2").returncode == 0
    assert result(tmp_path / "run").generations == 4
    unbroken = sia(*QUICK, "generations=4", folder="unbroken")
    assert unbroken.returncode == 0
    assert rundir.records(tmp_path / "run") == rundir.records(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["task=lawbnech"], "Did you mean 'lawbench'?"),
        (["task=toy", "generations=0"], "generations=0 must be at least 1."),
        (["task=toy", "target.harness=absent"], "is neither a harness of task 'toy' (reference)"),
        (["resume=absent"], "absent holds no run"),
        (["task=toy", "meta=replay"], "meta.run"),
        (["-cd", "absent"], "there is no such folder"),
        (["task=toy", "meta=scripted", "meta.script=absent.yaml"], "is not a list of steps"),
        (["experiment=null"], "leave it out"),
    ],
)
def test_a_mistake_exits_with_2_one_message_and_nothing_half_written(
    sia: Sia, tmp_path: Path, args: list[str], message: str
) -> None:
    done = sia(*args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_bug_keeps_its_traceback(sia: Sia, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Broken:\n    def __init__(self, script): pass\n"
        "    def propose(self, request): raise KeyError('a bug')\n"
    )
    done = sia(
        *QUICK, "meta._target_=mine.Broken", "trusted_packages=[mine]", "meta=scripted",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'a bug'" in done.stderr
    assert result(tmp_path / "run").status == "failed"


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_multirun_is_a_run_per_job(sia: Sia, tmp_path: Path, launcher: str) -> None:
    if launcher != "basic":
        pytest.importorskip(launcher.partition("_")[0])
    done = sia("-m", *QUICK, "sweep=seeds", "generations=2", f"hydra/launcher={launcher}")
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "runs" / "sweeps").glob("*/*/run.json"))
    assert [rundir.read_info(path.parent).seed for path in runs] == [0, 1, 2]
    assert all(result(path.parent).status == "finished" for path in runs)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
class TestSmallDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], check=False
        )
        if done.returncode != 0:
            pytest.skip("this machine does not let us mount a tmpfs")
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)

    def test_a_full_disk_is_a_clear_end_and_the_run_can_go_on(
        self, sia: Sia, tmp_path: Path, disk: Path
    ) -> None:
        run = disk / "run"
        done = sia(*QUICK, "meta=scripted", "generations=60", f"hydra.run.dir={run}")
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        finished = rundir.read_journal(run)
        assert len(finished) >= 4
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        done = sia(f"resume={run}", "generations=25")
        assert done.returncode == 0, done.stderr
        assert rundir.read_journal(run)[: len(finished)] == finished

    def test_a_read_only_folder_is_named(self, sia: Sia, tmp_path: Path, disk: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = sia(*QUICK, f"hydra.run.dir={disk}/run")
        assert done.returncode == 2, (done.stdout, done.stderr)
        assert "Read-only file system" in done.stderr
        assert "Traceback" not in done.stderr


def test_what_model_calls_have_cost_is_shown_and_kept(sia: Sia, tmp_path: Path) -> None:
    from sia.gateway.protocol import Role
    from sia.gateway.store import STORE_FILE, Exchange, Store

    store = Store(tmp_path / "run" / STORE_FILE, mode="record", now=0.0)
    store.add(
        Exchange(
            id=0, session=store.session, scope="g000-c0/target", role=Role.TARGET, format="chat",
            provider="p", requested_model="m", model="m", served_model="m", key="k", exact="e",
            occurrence=0, stream=False, status=200, headers={}, finish="stop", failure="",
            source="", input_tokens=1_200, cached_tokens=0, cache_write_tokens=0,
            output_tokens=34, estimated=False, counted=True, cost_usd=0.25, attempts=1,
            started_at=0.0, wall_s=1.0, request_zlib=None, body_zlib=None,
        )
    )  # fmt: skip
    store.close()
    done = sia(*QUICK, "generations=1", "meta=scripted")
    assert done.returncode == 0, done.stderr
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("target")]
    assert row == ["target", "1", "0", "0", "1,200", "0", "34", "$0.2500"]
    assert result(tmp_path / "run").spend["target"]["output_tokens"] == 34


def test_a_run_without_model_calls_says_nothing_of_them(sia: Sia, tmp_path: Path) -> None:
    done = sia(*QUICK, "generations=1", "meta=scripted")
    assert "model calls" not in done.stdout
    assert result(tmp_path / "run").spend == {}


def test_a_dry_run_prints_the_plan_and_leaves_nothing(sia: Sia, tmp_path: Path) -> None:
    done = sia(*QUICK, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "nothing was run" in done.stdout
    assert not list(tmp_path.iterdir())
    wrong = sia("task=toyy", "--dry-run")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "Did you mean 'toy'?" in wrong.stderr
