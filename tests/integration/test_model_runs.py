"""Whole runs whose target asks a model: budget, resume, record and replay."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sia import rundir
from sia.gateway import Role, Spend
from sia.gateway.scripted import Scripted, serving
from sia.gateway.store import read_spend

ITEMS = 400  # of the toy task
CALL_USD = 10e-6 + 20e-6  # ten tokens in at one dollar a million, ten out at two
RULES = [
    {"when": {"last": r"x = 0[.][0-3]"}, "say": "small", "usage": {"input": 10, "output": 10}},
    {"say": "large", "usage": {"input": 10, "output": 10}},
]
HARNESS = """
import argparse, csv, json, os, urllib.request
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--dataset_dir", type=Path)
parser.add_argument("--working_dir", type=Path)
args = parser.parse_args()


def ask(text):
    body = {"model": os.environ["SIA_MODEL"], "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"],
         "Content-Type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(request, timeout=30))
    return answer["choices"][0]["message"]["content"]


with (args.dataset_dir / "items.csv").open() as file:
    items = list(csv.DictReader(file))
with (args.working_dir / "submission.csv").open("w") as file:
    writer = csv.writer(file)
    writer.writerow(["id", "label"])
    for item in items:
        writer.writerow([item["id"], ask(f"x = {item['x']}: large or small?")])
"""
Sia = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with serving(RULES) as server:
        yield server


@pytest.fixture
def sia(tmp_path: Path, scripted: Scripted) -> Sia:
    """A run of the toy task whose target asks the scripted endpoint; into `folder`."""
    (tmp_path / "asks").mkdir()
    (tmp_path / "asks" / "target_agent.py").write_text(HARNESS)
    (tmp_path / "asks" / "harness.yaml").write_text("turn: 0\n")

    def run(*args: str, folder: str = "run") -> subprocess.CompletedProcess[str]:
        given = [
            "task=toy", "meta=scripted", "tracking=none", "provider=scripted",
            "target.harness=asks", "target.model=scripted-1", "target.attempt_s=120",
            f"hydra.run.dir={folder}",
        ]  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "sia", *([] if "resume" in args[0] else given), *args],
            cwd=tmp_path, env={**os.environ, "SIA_SCRIPTED_URL": scripted.url},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


def spent(run: Path) -> Spend:
    return read_spend(run / "gateway.sqlite")[Role.TARGET]


def test_a_budget_ends_the_run_within_a_call_of_each_worker_and_a_resume_pays_nothing_twice(
    sia: Sia, scripted: Scripted, tmp_path: Path
) -> None:
    two_at_once = ["search=best_of_n", "search.candidates=2", "workers=2", "generations=2"]
    limit = 1.2 * ITEMS * CALL_USD  # in the middle of the second generation
    done = sia(*two_at_once, f"budget.usd={limit}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"stopped   budget: budget.usd={limit:g} is used up" in done.stdout
    run = tmp_path / "run"
    assert limit <= spent(run).cost_usd <= limit + 2 * CALL_USD
    assert spent(run).calls == len(scripted.seen)
    found = rundir.read_result(run)
    assert found is not None
    assert (found.status, found.generations, found.best) == ("finished", 1, "g000-c0")
    assert found.best_score == 0.965

    done = sia(f"resume={run}", "budget.usd=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(scripted.seen) == spent(run).calls == 3 * ITEMS
    unbroken = sia(*two_at_once, folder="unbroken")
    assert unbroken.returncode == 0
    assert rundir.records(run) == rundir.records(tmp_path / "unbroken")


def test_a_replay_asks_nobody_and_says_what_it_has_no_answer_for(
    sia: Sia, scripted: Scripted, tmp_path: Path
) -> None:
    assert sia("generations=1").returncode == 0
    asked = len(scripted.seen)
    replay = ["generations=1", "gateway.mode=replay", f"gateway.recording={tmp_path / 'run'}"]
    assert sia(*replay, folder="again").returncode == 0
    assert rundir.records(tmp_path / "again") == rundir.records(tmp_path / "run")
    entry = tmp_path / "asks" / "target_agent.py"
    entry.write_text(entry.read_text().replace("large or small?", "small or large?"))
    done = sia(*replay, folder="changed")
    assert done.returncode == 1
    assert "replay    1 requests have no recorded answer. " in done.stdout
    assert "small or large?" in done.stdout
    assert len(scripted.seen) == asked


def test_a_model_without_a_provider_or_a_key_leaves_nothing_behind(
    sia: Sia, tmp_path: Path
) -> None:
    done = sia("provider=none")
    assert done.returncode == 2
    assert "target.model='scripted-1' needs a provider" in done.stderr
    done = sia("provider.api_key_env=NOT_SET_ANYWHERE")
    assert done.returncode == 2
    assert "NOT_SET_ANYWHERE" in done.stderr
    assert not (tmp_path / "run").exists()
