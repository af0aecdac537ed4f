"""Task folders of the upstream package, unmodified: `task=external task.dir=PATH`.

    data/public/     task.md, evaluate.py and what targets may read
    data/private/    what evaluate.py compares with
    reference/       reference_target_agent.py, requirements.txt, SAMPLE_TASK_DESCRIPTIONS.md

From it a folder of our own contract is staged in the cache, under a digest of its files and of the
settings. Its public side is the folder's without the evaluator; its private side is cut in two by
item id where a private file lists the items, so that half of them stay sealed until the exam.
"""

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sia.errors import TaskError
from sia.provenance import tree_sha256
from sia.tasks.evaluator import EVALUATOR, EXACT, JUDGE_FILE, Judge, is_share, missing_packages
from sia.tasks.keyed import SUFFIXES, Key, find_key, keep
from sia.tasks.task import ENTRY_POINT, Task, find_task_dir, load_task

STAGING = 1  # counts what makes older staged folders unusable
CACHE = "~/.cache/sia/tasks"
REFERENCE = "reference_target_agent.py"
DESCRIPTIONS = "SAMPLE_TASK_DESCRIPTIONS.md"
UPSTREAM_PACKAGE = "sia-agent"  # it holds the answers of its own tasks
# What evaluators look for. Of the first pattern that matches, the last file by name is taken: one
# file, so that nobody wonders which of several was scored. Never results.json, the evaluator's own.
SUBMISSIONS = (
    "submission.csv", "predictions.csv", "responses.json", "results/*.json", "submission*.csv",
    "submission*.json", "output*.json",
)  # fmt: skip
VERIFY = '''"""Scores with the evaluator of the folder that this task was staged from."""

from sia.tasks.evaluator import verify

__all__ = ["verify"]
'''


@dataclass(frozen=True, kw_only=True)
class Items:
    """What names the items of a private side.

    Attributes:
        file: The first private file that lists them, below the private folder.
        key: Its ids.
        files: All private files that list the same ids.
    """

    file: Path
    key: Key
    files: tuple[Path, ...]


def open_external(
    *,
    dir: str,
    metric: str | None = None,
    direction: str | None = None,
    dev_fraction: float | None = 0.5,
    id: str | None = None,
    submission: Sequence[str] | None = None,
    cache: str | None = None,
) -> Task:
    """The task that is staged from an upstream folder; staged now if it is not in the cache.

    Args:
        dir: The folder, seen from here or from the checkout.
        metric: Name of the number in results.json; None: `accuracy` where evaluate.py speaks of
            it, else the only number there. `exact_match` needs no evaluator: answers are compared
            with the private table.
        direction: `maximize` or `minimize`; None: maximize, for an accuracy.
        dev_fraction: Share of the items that steers the search; the others are sealed. None: all
            items do both.
        id: The field that holds the ids of items; None: found by its name.
        submission: Files that a target must leave; None: one of those that evaluators look for.
        cache: Where staged folders are kept; None: ~/.cache/sia/tasks.

    Raises:
        TaskError: The folder lacks something, with what to do about it.
    """
    source = find_task_dir(dir)
    if dev_fraction is not None and not 0 < dev_fraction < 1:
        raise TaskError(f"task.dev_fraction={dev_fraction:g} must lie between 0 and 1, or be null.")
    settings = {
        "staging": STAGING, "metric": metric, "direction": direction, "dev_fraction": dev_fraction,
        "id": id, "submission": list(submission) if submission else None,
    }  # fmt: skip
    _check_folder(source, metric)
    digest = hashlib.sha256(
        json.dumps([settings, str(source), tree_sha256(source)]).encode()
    ).hexdigest()
    root = Path(cache or CACHE).expanduser() / f"external-{source.name}-{digest[:16]}"
    if not (root / "task.yaml").is_file():
        stage(
            source,
            root,
            name=f"external-{source.name}",
            metric=metric or _metric(source),
            direction=direction,
            dev_fraction=dev_fraction,
            id=id,
            submission=submission,
            # A run and its exam must have been staged from the same files.
            version=int(digest[:7], 16),
        )
    return load_task(root)


def stage(
    source: Path,
    root: Path,
    *,
    name: str,
    metric: str,
    direction: str | None,
    dev_fraction: float | None,
    id: str | None = None,
    submission: Sequence[str] | None = None,
    version: int = 1,
    keep_source: bool = True,
    package: str = UPSTREAM_PACKAGE,
    **facts: Any,
) -> None:
    """Writes the folder of our contract to `root`, all of it or nothing.

    Args:
        source: An upstream folder.
        root: A folder that does not exist.
        name: Of the task.
        metric: See `open_external`, as the arguments that follow.
        direction: As above.
        dev_fraction: As above.
        id: As above.
        submission: As above.
        version: Of the task.
        keep_source: Whether `source` will still be there when submissions are scored.
        package: On the index, that holds the answers; empty: none does.
        **facts: Further entries of `task.yaml`.

    Raises:
        TaskError: The metric's direction is not known, or a file cannot be copied.
    """
    if direction is None and not (is_share(metric) or metric == "score"):
        raise TaskError(
            f"task.metric={metric!r}: is more of it better, or less? Say so: "
            "task.direction=maximize, or task.direction=minimize"
        )
    items = _items(source / "data" / "private", id) if _countable(submission) else None
    if metric == EXACT and (items is None or not _labels(source, items)):
        raise TaskError(
            "task.metric=exact_match compares answers with a private table, and "
            f"{source / 'data' / 'private'} holds none with the columns of sample_submission.csv."
        )
    sides = _sides(items, dev_fraction, name)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".stage-", dir=root.parent) as folder:
        fresh = Path(folder) / "task"
        fresh.mkdir()
        try:
            _copy(source, fresh)
            for split, ids in sides.items():
                judge = Judge(metric=metric, source=str(source) if keep_source else "")
                _write_side(source, fresh, split, ids, items, judge)
        except (OSError, ValueError, shutil.Error) as error:
            raise TaskError(f"{source} cannot be staged in {root.parent}: {error}") from error
        maximize = direction != "minimize"
        task = {
            "name": name,
            "version": version,
            "title": _title(fresh / "task.md"),
            "metric": {
                "name": metric, "direction": direction or "maximize",
                "floor": 0.0, "best": 1.0 if maximize else 0.0,
            },
            "submission": {"files": list(submission or ())}
            | ({} if submission else {"any_of": list(SUBMISSIONS)}),
            "source": {"kind": "folder", "package": package},
            "splits": {split: len(ids) for split, ids in sides.items()},
            "limits": {"attempt_s": 600.0, "verify_s": 300.0},
            "warnings": list(_warnings(items, dev_fraction)),
            **facts,
        }  # fmt: skip
        text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
        (fresh / "verify.py").write_text(VERIFY, encoding="utf-8")
        (fresh / "task.yaml").write_text(text, encoding="utf-8")
        try:
            fresh.rename(root)
        except OSError:
            if not (root / "task.yaml").is_file():  # else another process was faster
                raise


def _check_folder(source: Path, metric: str | None) -> None:
    public, private = source / "data" / "public", source / "data" / "private"
    for path in (public / "task.md", private, source / "reference" / REFERENCE):
        if not path.exists():
            raise TaskError(
                f"{source} is not a task folder of the upstream package: it has no "
                f"{path.relative_to(source)}. A folder with a task.yaml is opened with task=folder"
            )
    evaluator = public / EVALUATOR
    if not evaluator.is_file():
        if metric == EXACT:
            return
        ours = Path(__file__).resolve().parents[3] / "tasks" / source.name / "task.yaml"
        hint = f"The task with a verifier of ours: task={source.name}. " if ours.is_file() else ""
        raise TaskError(
            f"{source} has no data/public/{EVALUATOR}, so nobody can score it. {hint}To count the "
            f"answers that equal the private table's: task.metric={EXACT}. Or write {EVALUATOR}: "
            "it is run with --gen-dir G, finds the submission in G and writes G/results.json"
        )
    if missing := missing_packages(evaluator):
        raise TaskError(
            f"{evaluator} imports {', '.join(missing)}, which this Python lacks. "
            f"Install it: pip install {' '.join(missing)}"
        )


def _metric(source: Path) -> str:
    text = (source / "data" / "public" / EVALUATOR).read_text("utf-8", errors="replace")
    return "accuracy" if "accuracy" in text.lower() else "score"


def _countable(submission: Sequence[str] | None) -> bool:
    """Whether the items of a submission can be told apart: one file, of a known form."""
    return not submission or (len(submission) == 1 and Path(submission[0]).suffix in SUFFIXES)


def _items(private: Path, column: str | None) -> Items | None:
    """The private files that list the same items; None where there are none, or several lists."""
    found: dict[frozenset[str], list[tuple[Path, Key]]] = {}
    for path in sorted(private.rglob("*")):
        if path.is_file() and (key := find_key(path, column)):
            found.setdefault(frozenset(key.ids), []).append((path, key))
    if len(found) != 1:
        return None
    (same,) = found.values()
    file, key = same[0]
    return Items(file=file, key=key, files=tuple(path for path, _ in same))


def _labels(source: Path, items: Items) -> tuple[str, ...]:
    """The columns of the private table that a submission must answer."""
    if items.file.suffix != ".csv":
        return ()
    known = _header(items.file)
    sample = source / "data" / "public" / "sample_submission.csv"
    asked = _header(sample) if sample.is_file() else known if len(known) == 2 else []
    labels = tuple(name for name in asked if name != items.key.column)
    return labels if set(labels) <= set(known) else ()


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _sides(
    items: Items | None, dev_fraction: float | None, name: str
) -> dict[str, tuple[str, ...]]:
    """The ids of dev and of test, in the order of the private file."""
    if items is None:
        return {"dev": (), "test": ()}
    ids = items.key.ids
    if dev_fraction is None:
        return {"dev": ids, "test": ids}
    order = sorted(ids, key=lambda item: hashlib.sha256(f"{name}/{item}".encode()).digest())
    n_dev = min(len(ids) - 1, max(1, round(dev_fraction * len(ids))))
    dev = set(order[:n_dev])
    return {
        "dev": tuple(item for item in ids if item in dev),
        "test": tuple(item for item in ids if item not in dev),
    }


def _copy(source: Path, fresh: Path) -> None:
    """Everything but the private side. Links are followed: a target could not."""
    public, reference = source / "data" / "public", source / "reference"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(public, fresh / "data" / "public", ignore=ignore)
    if (public / EVALUATOR).is_file():
        (fresh / "evaluator").mkdir(mode=0o700)
        (fresh / "data" / "public" / EVALUATOR).rename(fresh / "evaluator" / EVALUATOR)
    shutil.copytree(reference, fresh / "harness", ignore=ignore)
    (fresh / "harness" / REFERENCE).rename(fresh / "harness" / ENTRY_POINT)
    if (reference / DESCRIPTIONS).is_file():
        (fresh / "harness" / DESCRIPTIONS).rename(fresh / "data" / "public" / DESCRIPTIONS)
    shutil.copyfile(public / "task.md", fresh / "task.md")


def _write_side(
    source: Path, fresh: Path, split: str, ids: Sequence[str], items: Items | None, judge: Judge
) -> None:
    """The private files of one split, and what the evaluator's guard knows about it."""
    private = source / "data" / "private"
    side = fresh / "data" / "private" / split
    side.parent.mkdir(exist_ok=True, mode=0o700)
    shutil.copytree(private, side / "private")
    if items is not None:
        columns = (items.key.column,) if items.key.column else ()
        for path in items.files:
            copy = side / "private" / path.relative_to(private)
            copy.write_text(keep(path, ids, columns=columns).text, encoding="utf-8")
        judge = replace(
            judge,
            ids=tuple(ids),
            columns=columns,
            key=items.file.relative_to(private).as_posix(),
            labels=_labels(source, items),
        )
    (side / JUDGE_FILE).write_bytes(msgspec.json.encode(judge))


def _title(task_md: Path) -> str:
    lines = task_md.read_text("utf-8", errors="replace").splitlines()
    return next((line.strip("# ").strip() for line in lines if line.strip("# ")), "")[:120]


def _warnings(items: Items | None, dev_fraction: float | None) -> list[str]:
    found = []
    if items is None:
        found.append(
            "No single file of data/private lists the items by id (CSV or JSON), or the submission "
            "is of another form: the score is the evaluator's own, whatever it divides by."
        )
    if items is None or dev_fraction is None:
        found.append(
            "Nothing is sealed: dev and test are the same items, so the exam repeats the dev score."
        )
    return found
