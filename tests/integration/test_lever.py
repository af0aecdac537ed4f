"""The weights lever in a run: chosen, trained in the sandbox, handed over, resumed, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_encoder
import tiny_llama
import yaml

from sia import rundir
from sia.provenance import tree_sha256

TOY = Path(__file__).resolve().parents[2] / "tasks" / "toy"
TRAIN = """
import csv
def rows(public, name):
    with (public / name).open() as file:
        return list(csv.DictReader(file))
def items(public):
    return [{"id": r["id"], "prompt": r["x"], "reference": r["label"]}
            for r in rows(public, "train.csv")]
def reward(item, answer):
    return float(answer.strip() == item["reference"])
def questions(public):
    return [{"id": r["id"], "prompt": r["x"]} for r in rows(public, "items.csv")]
"""
# Answers with what an update has left; `small` where there is nothing.
READS_SCORES = """
import csv, os, sys
def option(name):
    return sys.argv[sys.argv.index(name) + 1]
labels = {}
if folder := os.environ.get("SIA_POLICY"):
    import numpy as np
    with np.load(folder + "/scores.npz", allow_pickle=False) as file:
        best = file["logprobs"].argmax(1)
        labels = dict(zip(file["ids"].tolist(), file["labels"][best].tolist()))
with open(option("--dataset_dir") + "/items.csv") as file:
    items = list(csv.DictReader(file))
with open(option("--working_dir") + "/submission.csv", "w") as file:
    file.write("id,label\\n")
    file.writelines(f"{r['id']},{labels.get(r['id'], 'small')}\\n" for r in items)
"""
# Asks the model about eighty items, and answers for all others with `small`.
ASKS = """
import csv, json, os, sys, urllib.request
def option(name):
    return sys.argv[sys.argv.index(name) + 1]
def ask(text):
    body = {"model": os.environ["SIA_MODEL"], "temperature": 0, "max_tokens": 1,
            "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"],
         "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]
with open(option("--dataset_dir") + "/items.csv") as file:
    items = list(csv.DictReader(file))
with open(option("--working_dir") + "/submission.csv", "w") as file:
    file.write("id,label\\n")
    for k, row in enumerate(items):
        said = ask(row["x"]) if k < 80 else "s"
        print(said)
        file.write(f"{row['id']},{'large' if said == 'l' else 'small'}\\n")
"""
SFT = {"steps": 40, "lr": 0.01, "batch": 16, "rank": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lightning", reason="the extra `train` is not installed")
    return tiny_encoder.make(tmp_path_factory.mktemp("encoder") / "base")


@pytest.fixture
def task(tmp_path: Path, encoder: Path) -> Path:
    """The toy task with something to train: a label policy, and a harness that reads its scores."""
    folder = tmp_path / "trainable"
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("data", "__pycache__"))
    facts = yaml.safe_load((folder / "task.yaml").read_text())
    facts |= {
        "name": "trainable",
        "policy": {
            "kind": "label", "base": str(encoder), "labels": "public/labels.json",
            "calibration": "public/items.csv", "column": "x", "max_prompt_tokens": 16,
            "half": False, "folds": 2,
        },
        "recipes": {"sft": SFT},
    }  # fmt: skip
    (folder / "task.yaml").write_text(yaml.safe_dump(facts))
    (folder / "train.py").write_text(TRAIN)
    (folder / "harness" / "target_agent.py").write_text(READS_SCORES)
    return folder


Sia = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path, task: Path) -> Callable[..., list[str]]:
    def build(*args: str, folder: str = "run") -> list[str]:
        return [
            sys.executable, "-m", "sia", "task=folder", f"task.dir={task}", "tracking=none",
            "weights=auto", f"hydra.run.dir={tmp_path / folder}", *args,
        ]  # fmt: skip

    return build


@pytest.fixture
def sia(tmp_path: Path, command: Callable[..., list[str]]) -> Sia:
    def run(*args: str, folder: str = "run") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*args, folder=folder), cwd=tmp_path, capture_output=True, text=True,
            timeout=240, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return run


def finished(done: subprocess.CompletedProcess[str], run: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    return rundir.records(run)


ONLY_WEIGHTS = "levers=[weights,stop]"


def test_the_lever_is_pulled_and_the_target_uses_what_was_learned(sia: Sia, tmp_path: Path) -> None:
    run = tmp_path / "run"
    records = finished(sia(ONLY_WEIGHTS, "meta.max_updates=2"), run)
    first, second = records["0001/0/update"], records["0002/0/update"]
    assert first["recipe"] == "sft"
    assert not first.get("problem")
    assert first["report"]["steps"] == 40
    assert second["recipe"] == "grpo"  # references have been used
    assert records["0001/0/candidate"]["lever"] == "weights"
    assert records["0001/0/candidate"]["policy"] == "g001-c0"
    before = records["0000/0/evaluation"]["score"]
    after = records["0001/0/evaluation"]["score"]
    assert before == pytest.approx(0.37)
    assert after > 0.8
    assert (run / "gen-001/cand-0/policy/scores.npz").is_file()
    assert not (run / "gen-001/cand-0/update/work").exists()
    lineage = json.loads((run / "gen-002/cand-0/policy/fold1/update.json").read_text())
    assert lineage["parent"] == str(run / "gen-001/cand-0/policy/fold1")


def test_runs_that_share_a_cache_train_a_policy_once(sia: Sia, tmp_path: Path) -> None:
    shared = f"target.update_cache={tmp_path / 'shared'}"
    one, two = tmp_path / "one", tmp_path / "two"
    first = finished(sia(ONLY_WEIGHTS, shared, folder="one"), one)
    both = sia("meta.weights_after=1", "generations=6", shared, folder="two")
    second = finished(both, two)
    (later,) = (key for key in second if key.endswith("/update"))
    assert later > "0001/0/update"  # edits of the harness came first
    made, taken = first["0001/0/update"], second[later]
    assert made["taken_s"] == 0
    assert taken["report"] == made["report"]
    policy = Path("cand-0/policy")
    assert tree_sha256(one / "gen-001" / policy) == tree_sha256(two / f"gen-{later[1:4]}" / policy)
    line = next(line for line in rundir.read_journal(two) if line.key == later)
    assert line.wall_s < taken["taken_s"] < line.elapsed_s  # the run's clock is charged
    assert "taken over" in both.stdout
    again = sia("meta.weights_after=0", "generations=3", shared, folder="again")
    third = finished(again, tmp_path / "again")
    assert tree_sha256(one / "gen-001" / policy) == tree_sha256(tmp_path / "again/gen-001" / policy)
    assert first["0001/0/evaluation"] == third["0001/0/evaluation"]
    other = finished(sia(ONLY_WEIGHTS, shared, "seed=1", folder="other"), tmp_path / "other")
    assert other["0001/0/update"]["taken_s"] == 0


def test_later_edits_of_the_harness_keep_the_policy(sia: Sia, tmp_path: Path) -> None:
    records = finished(sia("meta.weights_after=1", "generations=8"), tmp_path / "run")
    made = {key: r for key, r in records.items() if key.endswith("/candidate")}
    updated = [key for key, r in made.items() if r.get("lever") == "weights"]
    assert len(updated) == 1
    after = [r for key, r in made.items() if key > updated[0]]
    assert after
    assert {r.get("policy") for r in after} == {made[updated[0]]["policy"]}


def overlap(run: Path, *keys: str) -> bool:
    """Whether both steps were under way at one time."""
    lines = {line.key: line for line in rundir.read_journal(run)}
    one, other = (lines[key] for key in keys)
    return max(line.elapsed_s - line.wall_s for line in (one, other)) < min(
        one.elapsed_s, other.elapsed_s
    )


@pytest.mark.slow  # a minute and a half of both cores
def test_the_policies_of_several_parents_are_updated_side_by_side(sia: Sia, tmp_path: Path) -> None:
    """Parents with one policy share an update; those with two get one each, from their own."""
    args = (
        ONLY_WEIGHTS, "search=archive", "search.candidates=4", "search.steepness=0",
        "generations=3", "meta.max_updates=9", "+weights.recipes.grpo={steps: 5}",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    records = finished(sia(*args, "workers=1", folder="one"), one)
    assert finished(sia(*args, "workers=2", folder="two"), two) == records
    assert [key for key in records if key.endswith("/update")] == [
        "0001/0/update", "0002/0/update", "0002/1/update",
    ]  # fmt: skip
    made = [records[f"0002/{k}/candidate"] for k in (0, 1)]
    assert {candidate["parent"] for candidate in made} == {"g000-c0", "g001-c0"}
    for candidate in made:
        policy = two / "gen-002" / f"cand-{candidate['index']}" / "policy"
        began = json.loads((policy / "fold0" / "update.json").read_text())["parent"]
        first = str(two / "gen-001/cand-0/policy/fold0")
        assert began == (first if candidate["parent"] == "g001-c0" else None)
    assert overlap(two, "0002/0/update", "0002/1/update")
    assert not overlap(one, "0002/0/update", "0002/1/update")


def test_an_update_cannot_open_what_the_verifier_knows(
    sia: Sia, task: Path, tmp_path: Path
) -> None:
    (task / "train.py").write_text(
        TRAIN
        + f"""
import os
from pathlib import Path
seen = []
for root in ({str(task)!r}, {str(tmp_path)!r}, "/sia", "/tmp", "/root", "/home"):
    for folder, _, files in os.walk(root):
        seen += [name for name in files if name in ("labels.csv", "journal.jsonl")]
try:
    seen.append(open({str(task / "data/private/dev/labels.csv")!r}).readline())
except OSError as error:
    print(type(error).__name__)
print("seen:", seen)
"""
    )
    records = finished(sia(ONLY_WEIGHTS, "sandbox=bwrap"), tmp_path / "run")
    assert not records["0001/0/update"].get("problem")
    said = (tmp_path / "run/gen-001/cand-0/update/stdout.log").read_text()
    assert "FileNotFoundError" in said
    assert "seen: []" in said


def test_an_update_that_fails_is_counted_and_the_run_goes_on(
    sia: Sia, task: Path, tmp_path: Path
) -> None:
    (task / "train.py").write_text(TRAIN + "\nraise RuntimeError('broken on purpose')\n")
    done = sia("meta.weights_after=1", "generations=8")
    records = finished(done, tmp_path / "run")
    (problem,) = [r["problem"] for key, r in records.items() if key.endswith("/update")]
    assert "broken on purpose" in problem
    outcomes = [r["outcome"] for key, r in records.items() if key.endswith("/attempt")]
    assert set(outcomes) == {"ok"}
    assert "update_failed" in done.stdout
    assert not list((tmp_path / "run").glob("gen-*/cand-0/policy"))


def test_an_update_that_is_not_ready_in_time_gives_what_it_has(sia: Sia, tmp_path: Path) -> None:
    records = finished(
        sia(ONLY_WEIGHTS, "target.update_s=44", "+weights.recipes.sft.steps=100000"),
        tmp_path / "run",
    )
    update = records["0001/0/update"]
    assert not update.get("problem")
    assert 0 < update["report"]["steps"] < 100_000


def test_a_killed_update_goes_on_at_its_step(
    command: Callable[..., list[str]], sia: Sia, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    args = (ONLY_WEIGHTS, "+weights.recipes.sft.steps=120")
    process = subprocess.Popen(
        command(*args), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    work = run / "gen-001/cand-0/update/work"
    deadline = time.monotonic() + 120
    while not list(work.rglob("*.ckpt")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run(
        [sys.executable, "-m", "sia", f"resume={run}"], cwd=tmp_path, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    records = finished(done, run)
    assert records["0001/0/update"]["report"]["steps"] == 120
    unbroken = finished(sia(*args, folder="unbroken"), tmp_path / "unbroken")
    assert records == unbroken


def test_a_model_that_the_run_serves_is_trained_and_served_with_its_adapter(
    sia: Sia, task: Path, tmp_path: Path
) -> None:
    tiny = tiny_llama.make(tmp_path)
    (task / "harness" / "target_agent.py").write_text(ASKS)
    (task / "train.py").write_text(TRAIN.replace('r["label"]}', 'r["label"][0]}'))
    run = tmp_path / "run"
    done = sia(
        ONLY_WEIGHTS, "target=hf", f"target.model={tiny.folder}", "target.harness=reference",
        "meta.max_updates=2", "+target.policy.max_answer_tokens=2",
        "+weights.recipes.grpo={steps: 2, items: 4, group: 16, temperature: 4}",
        "+weights.recipes.sft.steps=150",
    )  # fmt: skip
    records = finished(done, run)
    assert [records[f"000{k}/0/update"]["problem"] for k in (1, 2)] == ["", ""]
    assert records["0000/0/evaluation"]["score"] == pytest.approx(0.37)
    said = [(run / f"gen-{k:03}/cand-0/stdout.log").read_text().split() for k in range(3)]
    assert set(said[0]) - {"l", "s"}  # random weights
    assert set(said[1]) <= {"l", "s"}
    assert json.loads((run / "gen-002/cand-0/policy/update.json").read_text())["parent"] == str(
        run / "gen-001/cand-0/policy"
    )


def test_a_task_without_anything_to_train_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sia", "task=toy", "weights=sft", "hydra.run.dir=run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "has nothing to train in task 'toy'" in done.stderr
    assert not (tmp_path / "run").exists()
