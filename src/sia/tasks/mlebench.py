"""`python -m sia.tasks.mlebench COMPETITION`: a task folder from a competition of MLE-bench.

The package `mlebench` downloads and splits the data; the answers of its test items are cut in two
by id: half of them steer a search, half stay sealed. The verifier runs the competition's own grader
in a process of its own. The reference target is a linear model with knobs where the competition is
one table, else the sample submission.
"""

import argparse
import contextlib
import csv
import difflib
import importlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sia.errors import SiaError, TaskError
from sia.tasks import checks
from sia.tasks.data import task_module
from sia.tasks.evaluator import LOG_FILE
from sia.tasks.external import REFERENCE, stage
from sia.tasks.new import copy_harness, has_sentences
from sia.tasks.tables import read_table
from sia.tasks.task import ENTRY_POINT, Task, load_task

SUBMISSION, SAMPLE = "submission.csv", "sample_submission.csv"
EVALUATE = '''"""Runs the grader of an MLE-bench competition on G/submission.csv."""

import argparse
import json
from pathlib import Path

from mlebench.registry import registry
from mlebench.utils import load_answers, read_csv

COMPETITION = {competition!r}
ANSWERS = {answers!r}

parser = argparse.ArgumentParser()
parser.add_argument("--gen-dir", type=Path, required=True)
folder = parser.parse_args().gen_dir
private = Path(__file__).resolve().parents[1] / "private"
grade = registry.get_competition(COMPETITION).grader.grade_fn
score = grade(read_csv(folder / "submission.csv"), load_answers(private / ANSWERS))
(folder / "results.json").write_text(json.dumps({{"score": float(score)}}))
'''
CONTROLS = '''"""The two ends of the metric: the right answers, and the sample submission."""

import csv
import shutil
from pathlib import Path


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Submits the private answers, in the columns of the sample submission."""
    public = labels_dir.parents[1] / "public"
    with (public / "sample_submission.csv").open(encoding="utf-8-sig", newline="") as file:
        columns = next(csv.reader(file))
    (gold,) = sorted((labels_dir / "private").glob("gold.csv")) or [
        labels_dir / "private" / "answers.csv"
    ]
    with (
        gold.open(encoding="utf-8-sig", newline="") as source,
        (submission_dir / "submission.csv").open("w", encoding="utf-8", newline="") as target,
    ):
        writer = csv.DictWriter(target, columns, extrasaction="ignore", lineterminator="\\n")
        writer.writeheader()
        writer.writerows(csv.DictReader(source))


def null(public_dir: Path, submission_dir: Path) -> None:
    """Submits the sample submission."""
    shutil.copyfile(public_dir / "sample_submission.csv", submission_dir / "submission.csv")
'''
COPY_SAMPLE = '''"""Submits the sample submission, where there is no single table to learn from."""

import argparse
import shutil
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--dataset_dir", type=Path, required=True)
parser.add_argument("--working_dir", type=Path, required=True)
args = parser.parse_args()
shutil.copyfile(args.dataset_dir / "sample_submission.csv", args.working_dir / "submission.csv")
'''
CONTRACT = """
## How this task is run here

    python target_agent.py --dataset_dir D --working_dir W

`D` holds the files of the competition, read-only. Leave `submission.csv` in `W`, in the form of
`sample_submission.csv`, with one row for each item: a missing or repeated item makes the whole
submission invalid. There is no network. One half of the items steers the search, the other half
stays sealed; which is which is not told.
"""


@dataclass(frozen=True, kw_only=True)
class Competition:
    """What `mlebench` says about a prepared competition."""

    id: str
    description: str
    public: Path
    answers: Path
    gold: Path
    sample: Path
    metric: str
    lower_is_better: bool


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sia.tasks.mlebench", description=__doc__)
    parser.add_argument("competition", help="its id, such as spaceship-titanic")
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="default: tasks")
    parser.add_argument(
        "--dev-fraction", type=float, default=0.5,
        help="share of the test items that steers the search; the others are sealed (default: 0.5)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        task = create(args.competition, out=args.out, dev_fraction=args.dev_fraction)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{task.root}: {task.metric.name}, {task.metric.direction}, {task.facts.splits}")
    for warning in task.facts.warnings:
        print(f"warning   {warning}")
    print(f"next      python -m sia.tasks check {task.root}")
    print(f"          python -m sia task=folder task.dir={task.root}")
    return 0


def create(competition: str, *, out: Path, dev_fraction: float = 0.5) -> Task:
    """Writes the folder `out/mlebench-<competition>`; all of it or nothing.

    Raises:
        TaskError: The package, the credentials or the competition are missing, with the next step.
    """
    root = out / f"mlebench-{competition}"
    if root.exists():
        raise TaskError(f"{root} exists already. Remove it first: rm -r {root}")
    if not 0 < dev_fraction < 1:
        raise TaskError(f"--dev-fraction {dev_fraction:g} must lie between 0 and 1")
    found = prepared(competition)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlebench-", dir=out) as folder:
        source, fresh = Path(folder) / "source", Path(folder) / root.name
        _write_source(found, source)
        stage(
            source,
            fresh,
            name=root.name,
            metric=found.metric,
            direction="minimize" if found.lower_is_better else "maximize",
            dev_fraction=dev_fraction,
            id=_header(source / "data" / "public" / SAMPLE)[0],
            submission=(SUBMISSION,),
            keep_source=False,
            package="",
            limits={"attempt_s": 1800.0, "verify_s": 600.0, "memory_mib": 8192},
        )
        (fresh / "controls.py").write_text(CONTROLS, encoding="utf-8")
        _document(fresh, found)
        fresh.rename(root)
    return load_task(root)


def prepared(competition: str) -> Competition:
    """The competition, downloaded and split by `mlebench` if it is not yet.

    Raises:
        TaskError: See `create`.
    """
    if importlib.util.find_spec("mlebench") is None:
        raise TaskError(
            "The package mlebench is not installed, which knows the competitions. It is not on the "
            "package index:\n"
            "  1. pip install git+https://github.com/openai/mle-bench (needs git-lfs)\n"
            "  2. make a Kaggle token and put it into ~/.kaggle/kaggle.json\n"
            f"  3. accept the rules: https://www.kaggle.com/c/{competition}/rules\n"
            f"  4. python -m sia.tasks.mlebench {competition}"
        )
    registry = importlib.import_module("mlebench.registry").registry
    source = importlib.import_module("mlebench.data")
    known = registry.list_competition_ids()
    if competition not in known:
        close = difflib.get_close_matches(competition, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TaskError(f"mlebench knows no competition {competition!r}.{hint}")
    found = registry.get_competition(competition)
    if not source.is_dataset_prepared(found):
        if not _has_credentials():
            raise TaskError(
                f"The data of {competition!r} are not here, and Kaggle gives them to its members "
                "only. Make a token in your Kaggle settings, put it into ~/.kaggle/kaggle.json, "
                f"accept the rules at https://www.kaggle.com/c/{competition}/rules, and try again: "
                f"python -m sia.tasks.mlebench {competition}"
            )
        try:
            source.download_and_prepare_dataset(found)
        except Exception as error:  # whatever a package raises that talks to a service
            raise TaskError(
                f"mlebench could not prepare {competition!r}: {type(error).__name__}: {error}. "
                f"See what it says: mlebench prepare -c {competition}"
            ) from error
    lower = found.grader.is_lower_better(source.get_leaderboard(found))
    return Competition(
        id=competition,
        description=found.description,
        public=found.public_dir,
        answers=found.answers,
        gold=found.gold_submission,
        sample=found.sample_submission,
        metric=re.sub(r"[^a-z0-9_]+", "_", str(found.grader.name).lower()).strip("_") or "score",
        lower_is_better=bool(lower),
    )


def _has_credentials() -> bool:
    """Whether a token is there for the Kaggle client; what it is does not matter to us."""
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        return True
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or "~/.kaggle").expanduser()
    return (folder / "kaggle.json").is_file()


def _write_source(found: Competition, source: Path) -> None:
    """The competition in the form that `sia.tasks.external` reads."""
    public, private = source / "data" / "public", source / "data" / "private"
    shutil.copytree(found.public, public)
    if not (public / SAMPLE).is_file():
        shutil.copyfile(found.sample, public / SAMPLE)
    (public / "description.md").unlink(missing_ok=True)
    (public / "task.md").write_text(found.description + CONTRACT, encoding="utf-8")
    private.mkdir()
    answers = f"answers{found.answers.suffix}"
    shutil.copyfile(found.answers, private / answers)
    if found.gold != found.answers:
        shutil.copyfile(found.gold, private / f"gold{found.gold.suffix}")
    evaluate = EVALUATE.format(competition=found.id, answers=answers)
    (public / "evaluate.py").write_text(evaluate, encoding="utf-8")
    _write_harness(public, source / "reference", found)


def _write_harness(public: Path, harness: Path, found: Competition) -> None:
    changes = table_settings(public, found.metric)
    if changes is None:
        harness.mkdir()
        (harness / REFERENCE).write_text(COPY_SAMPLE, encoding="utf-8")
        return
    rows = read_table(public / "train.csv")
    columns = [name for name in rows[0] if name not in changes["columns"].values()]
    copy_harness(harness, changes, sentences=has_sentences(rows, columns))
    (harness / ENTRY_POINT).rename(harness / REFERENCE)


def table_settings(public: Path, metric: str) -> dict[str, Any] | None:
    """How the harness for tables answers the competition; None where that is not one table."""
    files = [public / name for name in ("train.csv", "test.csv", SAMPLE)]
    if not all(path.is_file() for path in files):
        return None
    try:
        headers = [_header(path) for path in files]
        (id, label) = headers[2]
    except (ValueError, csv.Error, UnicodeDecodeError):
        return None
    if id not in headers[0] or id not in headers[1] or label not in headers[0]:
        return None
    labels = {row[label] for row in read_table(files[0]) if row[label]}
    sample = {row[label] for row in read_table(files[2])}
    answer = "class"
    if labels <= {"0", "1"} and ("auc" in metric or "log" in metric or not sample <= labels):
        answer = "chance"
    elif all(_is_number(text) for text in labels) and len(labels) > 20:
        answer = "number"
    return {
        "columns": {"id": id, "label": label},
        "files": {"train": "train.csv", "items": "test.csv"},
        "answer": answer,
    }


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file))


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return abs(float(text)) < 1e300
    return False


def _document(root: Path, found: Competition) -> None:
    """The scores of the controls in task.yaml, and the README."""
    path = root / "task.yaml"
    facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    facts["title"] = f"The competition {found.id} of MLE-bench"
    path.write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), encoding="utf-8")
    task = load_task(root)
    controls, verify = task_module(task, "controls"), task_module(task, "verify").verify
    scores: dict[str, dict[str, float]] = {"oracle": {}, "null": {}}
    for name in scores:
        for split in checks.SPLITS:
            with tempfile.TemporaryDirectory(prefix="sia-control-") as folder:
                side = task.labels_dir(split) if name == "oracle" else task.public_dir
                try:
                    getattr(controls, name)(side, Path(folder))
                    scores[name][split] = verify(Path(folder), task.labels_dir(split))["score"]
                except (OSError, ValueError, RuntimeError) as error:
                    log = task.labels_dir(split) / LOG_FILE
                    said = log.read_text("utf-8", errors="replace").strip() if log.is_file() else ""
                    raise TaskError(
                        f"The grader of {found.id!r} does not take the {name} control: "
                        f"{said.splitlines()[-1] if said else error}"
                    ) from error
    facts["controls"] = scores
    path.write_text(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (root / "README.md").write_text(
        f"# {root.name}\n\n"
        f"**Question** see `task.md`. **Source** the Kaggle competition {found.id}, prepared by "
        "`mlebench`; its rules hold, and its data are not to be passed on.\n"
        f"**Metric** {found.metric}, {task.metric.direction}, by the competition's own grader, on "
        f"{facts['splits']['dev']} dev and {facts['splits']['test']} test items: the test items of "
        "MLE-bench, cut in two.\n"
        f"**Known scores** oracle {scores['oracle']['test']:g}, sample submission "
        f"{scores['null']['test']:g}, both on test.\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
