"""Scores a submission with an `evaluate.py` that somebody else wrote, and counts every item.

The evaluator is a program, `evaluate.py --gen-dir G`, that finds a submission in G and leaves
`G/results.json`. It runs in a process of its own, in a tree that is put together for this one call:

    data/public/    the public side, with evaluate.py
    data/private/   the private files of one split
    G               the submission, without what is repeated or belongs to no item of the split

Nothing of G is executed, and nothing is read back but what the evaluator has written there.

Such evaluators divide by what was answered, so their number cannot be taken as it is. The score is,
in this order: the mean over all items of what the evaluator says about each; the number of right
answers that it reports over all items; its own number, where every item is answered. It stands
beside the score as `reported`.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sia.tasks.keyed import ID_NAMES, SUFFIXES, Kept, keep
from sia.tasks.tables import read_table

JUDGE_FILE = "judge.json"  # in each folder of private labels, beside `private/`
EVALUATOR = "evaluate.py"
EXACT = "exact_match"  # the metric of folders without an evaluator
RESULTS = "results.json"
LOG_FILE = "evaluator.log"
MAX_RESULTS_BYTES = 32 * 2**20
MAX_METRICS = 30
CORRECT_NAMES = ("is_correct", "correct", "passed", "score")
COUNT_NAMES = ("n_correct", "num_correct", "correct_count", "correct")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What is known about one split of a task that has an evaluator of its own.

    Attributes:
        metric: Name of the number in results.json; EXACT: there is no evaluator.
        ids: The items; empty where nobody knows them.
        columns: Fields that hold ids, besides the usual ones.
        key: The private file that lists the items, below `private/`.
        labels: Columns of it that hold what is right, where it is a table and they are known.
        source: The folder the task was made from; what else lies there is shown to the evaluator.
        timeout_s: Of the evaluator.
    """

    metric: str
    ids: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    key: str = ""
    labels: tuple[str, ...] = ()
    source: str = ""
    timeout_s: float = 300.0


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """The contract of a `verify.py`, for a staged task.

    Raises:
        ValueError: The submission cannot be scored, with one line that says why.
        RuntimeError: The evaluator is at fault.
    """
    labels_dir = labels_dir.resolve()
    judge = msgspec.json.decode((labels_dir / JUDGE_FILE).read_bytes(), type=Judge)
    files = sorted(path for path in submission_dir.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix="sia-evaluator-") as folder:
        given = Path(folder) / "given"
        kept = _hand_over(files, submission_dir, given, judge)
        if judge.metric == EXACT:
            return _score(judge, None, kept, labels_dir)
        tree = Path(folder) / "task"
        _assemble(tree, labels_dir, judge)
        results = _evaluate(tree, given, judge, labels_dir / LOG_FILE)
        return _score(judge, results, kept, labels_dir)


def missing_packages(evaluator: Path) -> list[str]:
    """Packages that an evaluator imports at its top and that are not installed here."""
    try:
        body = ast.parse(evaluator.read_bytes()).body
    except (SyntaxError, ValueError):
        return []  # its own message is better than ours
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    beside = {path.stem for path in evaluator.parent.iterdir()}
    roots = sorted({name.partition(".")[0] for name in names} - beside)
    return [name for name in roots if importlib.util.find_spec(name) is None]


def is_share(metric: str) -> bool:
    """Whether a metric is the share of items that are right."""
    return metric == EXACT or "accuracy" in metric.lower() or metric.lower() in ("acc", "pass_rate")


def _hand_over(files: list[Path], root: Path, given: Path, judge: Judge) -> Kept | None:
    """Copies the submission; where the items are known, only what answers one of them, once."""
    given.mkdir()
    kept: Kept | None = None
    for path in files:
        target = given / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not judge.ids:
            shutil.copyfile(path, target, follow_symlinks=False)
            continue
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path.name} is neither .csv nor .json: its items cannot be counted")
        kept = keep(path, judge.ids, columns=judge.columns)
        target.write_text(kept.text, encoding="utf-8")
    if judge.ids and kept is None:
        raise ValueError("there is no submission")
    return kept


def _assemble(tree: Path, labels_dir: Path, judge: Judge) -> None:
    """The folder that the evaluator takes for the whole task.

    Python files are copied, because they may ask where they lie; the rest are links.
    """
    root = labels_dir.parents[2]
    public = tree / "data" / "public"
    public.mkdir(parents=True)
    _link_all(root / "data" / "public", public)
    shutil.copyfile(root / "evaluator" / EVALUATOR, public / EVALUATOR)
    (tree / "data" / "private").symlink_to(labels_dir / "private")
    if judge.source and Path(judge.source).is_dir():
        _link_all(Path(judge.source), tree, leave=("data", "reference"))
        _link_all(Path(judge.source) / "data", tree / "data", leave=("public", "private"))


def _link_all(source: Path, target: Path, *, leave: tuple[str, ...] = ()) -> None:
    for path in source.iterdir():
        if path.name in leave:
            continue
        if path.suffix == ".py":
            shutil.copyfile(path, target / path.name)
        else:
            (target / path.name).symlink_to(path.resolve())


def _evaluate(tree: Path, given: Path, judge: Judge, log: Path) -> Any:
    """Runs the evaluator and reads its results, once, after it has ended well."""
    command = [
        sys.executable, "-B", str(tree / "data" / "public" / EVALUATOR), "--gen-dir", str(given),
    ]  # fmt: skip
    with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as home:
        try:
            done = subprocess.run(
                command,
                cwd=tree,
                env=_environment(home),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=judge.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{EVALUATOR} took longer than {judge.timeout_s:g} s") from None
        if done.returncode != 0:
            # Not into the message, which the meta backend may read: it can hold labels.
            output.seek(max(0, output.tell() - 2**16))
            log.write_bytes(output.read())
            raise ValueError(
                f"{EVALUATOR} ended with exit code {done.returncode}; what it said is in {log}"
            )
    path = given / RESULTS
    if path.is_symlink() or not path.is_file():
        raise RuntimeError(f"{EVALUATOR} ended well and left no {RESULTS}")
    if path.stat().st_size > MAX_RESULTS_BYTES:
        raise RuntimeError(f"{RESULTS} is larger than {MAX_RESULTS_BYTES // 2**20} MiB")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise RuntimeError(f"{RESULTS} is not JSON") from error


def _environment(home: str) -> dict[str, str]:
    kept = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT")
    clean = {name: os.environ[name] for name in kept if name in os.environ}
    return {**clean, "HOME": home, "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1"}


def _score(judge: Judge, results: Any, kept: Kept | None, labels_dir: Path) -> dict[str, Any]:
    reported = None if judge.metric == EXACT else find_number(results, judge.metric)
    found: dict[str, Any] = {"metrics": {}, "symptoms": {}, "items": {}}
    if reported is not None:
        found["metrics"] = {**_scalars(results, judge), "reported": reported}
    if kept is None:
        assert reported is not None
        return {**found, "score": reported}
    answered = [item for item in judge.ids if kept.answers.get(item, "").strip()]
    found["n_items"], found["n_answered"] = len(judge.ids), len(answered)
    found["answers"] = kept.answers
    found["metrics"] |= {
        "n_repeated": float(len(kept.repeated)),
        "n_unknown": float(kept.unknown),
    }
    if is_share(judge.metric):
        count = _count(results, len(judge.ids))
        items = _said_items(results, judge)
        if not items:
            told = None if reported is None or not answered else reported * len(answered)
            items = _equal_items(judge, kept, (count, told), labels_dir)
        score = sum(items.values()) / len(judge.ids) if items else None
        if score is None and count is not None:
            score = count / len(judge.ids)
        if score is not None:
            silent = 1 - len(answered) / len(judge.ids)
            found["symptoms"] = {"error_share": 1 - score, "abstained_share": silent}
            return {**found, "score": score, "items": items}
    if len(answered) < len(judge.ids):
        # How the evaluator treats a gap is not known, and leaving out the hard items could pay.
        raise ValueError(
            f"{len(judge.ids) - len(answered)} of {len(judge.ids)} items have no answer (missing, "
            f"empty or repeated), and {EVALUATOR} does not say what each item scores: answer all"
        )
    return {**found, "score": reported}


def find_number(results: Any, metric: str) -> float:
    """The number of that name, the outermost one; else the only number that there is.

    Raises:
        RuntimeError: There is neither.
    """
    numbers = list(_numbers(results))
    for name, value in numbers:
        if name.rpartition(".")[2].lower() == metric.lower():
            return value
    if len(numbers) == 1:
        return numbers[0][1]
    names = ", ".join(name for name, _ in numbers[:10]) or "no number at all"
    raise RuntimeError(f"{RESULTS} has no number {metric!r}, but {names}. Name it: task.metric=...")


def _numbers(results: Any) -> Iterator[tuple[str, float]]:
    """Finite numbers by dotted name, outer ones first; lists are not looked into."""
    level = [("", results)]
    for _ in range(4):
        deeper = []
        for prefix, value in level:
            for name, each in value.items() if isinstance(value, dict) else ():
                path = f"{prefix}{name}"
                if isinstance(each, dict):
                    deeper.append((f"{path}.", each))
                elif _is_number(each):
                    yield path, float(each)
        level = deeper


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _scalars(results: Any, judge: Judge) -> dict[str, float]:
    """Aggregates of the outer two levels: further in, numbers may belong to items or classes."""
    items = set(judge.ids)
    found: dict[str, float] = {}
    for name, value in _numbers(results):
        parts = name.split(".")
        owner = results if len(parts) == 1 else results[parts[0]]
        if len(parts) > 2 or len(owner) > MAX_METRICS or not items.isdisjoint(owner):
            continue
        found[re.sub(r"[^A-Za-z0-9_]", "_", parts[-1])[:60]] = value
    return dict(list(found.items())[:MAX_METRICS])


def _count(results: Any, n: int) -> float | None:
    """How many answers the evaluator found right."""
    numbers = {name.rpartition(".")[2]: value for name, value in reversed(list(_numbers(results)))}
    for name in COUNT_NAMES:
        if name in numbers and 0 <= numbers[name] <= n:
            return numbers[name]
    return None


def _said_items(results: Any, judge: Judge) -> dict[str, float]:
    """What the evaluator says about each item: an item that it is silent on, or repeats, has 0."""
    values = list(results.values()) if isinstance(results, dict) else [results]
    for value in values:
        if not isinstance(value, list) or not value:
            continue
        said: dict[str, list[float]] = {item: [] for item in judge.ids}
        for entry in value:
            item, hit = _said(entry, (*judge.columns, *ID_NAMES))
            if hit is not None and item in said:
                said[item].append(hit)
        if any(said.values()):
            return {item: hits[0] if len(hits) == 1 else 0.0 for item, hits in said.items()}
    return {}


def _said(entry: Any, names: tuple[str, ...]) -> tuple[str, float | None]:
    if not isinstance(entry, Mapping):
        return "", None
    item = next((str(entry[name]) for name in names if name in entry), "")
    for name in CORRECT_NAMES:
        value = entry.get(name)
        if isinstance(value, bool | int | float) and 0 <= value <= 1:
            return item, float(value)
    return item, None


def _equal_items(
    judge: Judge, kept: Kept, told: tuple[float | None, float | None], labels_dir: Path
) -> dict[str, float]:
    """1 for each answer that equals the private table's; empty where the evaluator disagrees."""
    path = labels_dir / "private" / judge.key
    if path.suffix != ".csv" or not judge.labels:
        return {}
    truth = {row[judge.columns[0]].strip(): row for row in read_table(path)}
    items = {}
    for item in judge.ids:
        cells = kept.cells.get(item, {})
        hits = [cells.get(name, "").strip() == truth[item][name].strip() for name in judge.labels]
        items[item] = float(all(hits))
    total = sum(items.values())
    if judge.metric != EXACT and not any(
        count is not None and abs(count - total) < 1e-6 for count in told
    ):
        return {}
    return items
