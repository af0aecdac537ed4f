"""`python -m sia.tasks.new NAME [--from CSV --label COLUMN]`: a task folder whose free tests pass.

The table is copied into the folder, its rows are split into train, dev and test, and the reference
harness is a linear model with knobs that `meta=optuna` can turn. Without a table, one is made up:
replace it, or start from it.
"""

import argparse
import csv
import json
import math
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from sia.errors import SiaError, TaskError
from sia.tasks import checks, data
from sia.tasks.data import task_module
from sia.tasks.task import Task, load_task

NAME = re.compile(r"[a-z][a-z0-9_-]*")
CLASSES = 20  # labels that are numbers, and no more different ones than this, are classes
MAX_NUMBERS = 1e150
AS_WRONG = (
    "over all items. A missing or repeated answer, and one that is no number, is as wrong as two "
    "labels can be apart."
)
METRICS = {
    "accuracy": "Accuracy over all items. A missing, unknown or repeated answer is wrong.",
    "rmse": f"Root mean square error {AS_WRONG}",
    "mae": f"Mean absolute error {AS_WRONG}",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a table before its folder is written.

    Attributes:
        id: The column that names rows; empty: there is none.
        features: All other columns.
        label_format: How a label is written, so that no other cell is equal to it.
    """

    name: str
    id: str
    label: str
    features: tuple[str, ...]
    metric: str
    numbers: bool
    label_format: str
    sentences: bool
    n_rows: int


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sia.tasks.new", description=__doc__)
    parser.add_argument("name", help="of the task and its folder: small letters, digits, - and _")
    parser.add_argument(
        "--from", dest="table", type=Path, metavar="CSV", help="a table with header"
    )
    parser.add_argument("--label", metavar="COLUMN", help="the column that targets must say")
    parser.add_argument("--id", metavar="COLUMN", help="a column that names rows and says no more")
    parser.add_argument("--metric", choices=METRICS, help="default: by the label column")
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="default: tasks")
    args = parser.parse_args(argv)
    try:
        task = create(
            args.name, out=args.out, table=args.table, label=args.label, id=args.id,
            metric=args.metric,
        )  # fmt: skip
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{task.root}: {task.metric.name}, {task.facts.splits}")
    print(f"next      read and correct {task.root}/task.md and README.md")
    print(f"          python -m sia.tasks check {_shown(task.root)}")
    print(f"          python -m sia task=folder task.dir={_shown(task.root)}")
    return 0


def create(
    name: str,
    *,
    out: Path,
    table: Path | None = None,
    label: str | None = None,
    id: str | None = None,
    metric: str | None = None,
) -> Task:
    """Writes the folder `out/name`, its data included; all of it or nothing.

    Args:
        name: Of the task.
        out: Where the folder is made.
        table: A CSV file with a header; None: one is made up.
        label: Its column that targets must say.
        id: Its column that names rows and says no more; None: a column of that name, if any.
        metric: accuracy, rmse or mae; None: accuracy, or rmse where labels are many numbers.

    Raises:
        TaskError: A name or a column is wrong, the table is too small, or the folder exists.
    """
    if not NAME.fullmatch(name):
        raise TaskError(f"{name!r} is no name for a task: small letters, digits, - and _")
    root = out / name
    if root.exists():
        raise TaskError(f"{root} exists already. Remove it, or choose another name.")
    if table is None and (label or id):
        raise TaskError("--label and --id name columns of a table: give it with --from table.csv")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as folder:
        fresh = Path(folder) / name
        fresh.mkdir()
        if table is None:
            _make_up(fresh / "table.csv")
            table, label = fresh / "table.csv", "label"
        plan = _plan(name, _read(table), label, id, metric)
        if table.parent != fresh:
            shutil.copyfile(table, fresh / "table.csv")
        _write(fresh, plan)
        if faults := [*checks.controls(load_task(fresh)), *checks.leaks(load_task(fresh))]:
            raise TaskError(f"The free tests of the new task fail: {'; '.join(faults[:3])}")
        fresh.rename(root)
    return load_task(root)


def copy_harness(target: Path, changes: dict[str, Any], *, sentences: bool) -> None:
    """The reference harness for tables, with other settings in `harness.yaml`.

    Args:
        target: A folder that does not exist.
        changes: Key of harness.yaml -> its value.
        sentences: Whether the table has them; else nothing is said of them in `space.yaml`.
    """
    source = resources.files("sia.tasks") / "table_task" / "harness"
    target.mkdir()
    for name in ("target_agent.py", "columns.py", "harness.yaml", "space.yaml"):
        text = (source / name).read_text("utf-8")
        if name == "harness.yaml":
            for key, value in changes.items():
                flow = yaml.safe_dump(value, default_flow_style=True, width=500, allow_unicode=True)
                text = _set_line(text, f"{key}: ", flow.removesuffix("...\n").strip())
        elif name == "space.yaml" and not sentences:
            text = re.sub(r"^  text\..*\n", "", text, flags=re.MULTILINE)
            text = re.sub(
                r"^  - when: \{\}\n    set: \{text(?:.*\n){3}", "", text, flags=re.MULTILINE
            )
        (target / name).write_text(text, encoding="utf-8")


def _set_line(text: str, start: str, value: str) -> str:
    """Replaces what follows `start` at the beginning of a line, up to a comment."""
    pattern = rf"^{re.escape(start)}.*?(?=  #|$)"
    return re.sub(pattern, lambda _: start + value, text, flags=re.MULTILINE)


def _literal(value: bool | str) -> str:
    """A constant as Python writes it, with double quotes where it can."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def has_sentences(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> bool:
    """Whether a column holds three words and more in a cell, as the harness tells them."""
    for name in columns:
        cells = [row[name].split() for row in rows if (row[name] or "").strip()]
        if cells and sum(map(len, cells)) >= 3 * len(cells):
            return True
    return False


def _plan(
    name: str, rows: list[dict[str, str]], label: str | None, id: str | None, metric: str | None
) -> Plan:
    columns = list(rows[0])
    named = id if id is not None else "id" if "id" in columns else ""
    if label is None:
        raise TaskError(f"Which column must targets say? --label COLUMN, one of: {columns}")
    for option, column in (("label", label), *((("id", id),) if id else ())):
        if column not in columns:
            raise TaskError(f"--{option} {column!r} is no column of the table: {columns}")
    if label == "id" or label == named:
        raise TaskError(f"--label {label!r} names the rows: choose another column")
    features = tuple(column for column in columns if column not in (named, label))
    if not features or "id" in features:
        raise TaskError(
            f"Besides id and label the table has {list(features)!r}: at least one column is "
            "needed, and none of them may be called 'id'. Name the rows' column: --id COLUMN"
        )
    labels = [row[label].strip() for row in rows if row[label].strip()]
    if len(labels) < 40:
        raise TaskError(f"The table has {len(labels)} rows with a {label!r}; 40 are needed")
    if len(set(labels)) < 2:
        raise TaskError(f"Every row has the {label!r} {labels[0]!r}: there is nothing to say")
    numbers = all(_is_number(text) for text in labels)
    if metric in ("rmse", "mae") and not numbers:
        wrong = next(text for text in labels if not _is_number(text))
        raise TaskError(f"--metric {metric} needs numbers, and {label!r} holds {wrong!r}")
    if metric is None:
        metric = "rmse" if numbers and len(set(labels)) > CLASSES else "accuracy"
    return Plan(
        name=name,
        id=named,
        label=label,
        features=features,
        metric=metric,
        numbers=metric != "accuracy",
        label_format=_label_format(rows, features, label, labels, metric),
        sentences=has_sentences(rows, features),
        n_rows=len(labels),
    )


def _label_format(
    rows: list[dict[str, str]],
    features: Sequence[str],
    label: str,
    labels: list[str],
    metric: str,
) -> str:
    cells = {row[name] for row in rows for name in features}
    if metric != "accuracy":
        shown = {repr(float(text)) for text in labels}
        return "{:.17e}" if cells & shown else "{!r}"
    return f"{label.replace('{', '{{').replace('}', '}}')}={{}}" if cells & set(labels) else "{}"


def _write(root: Path, plan: Plan) -> None:
    """All files of the folder, its splits, and the controls' scores in task.yaml."""
    source = resources.files("sia.tasks") / "table_task"
    constants: dict[str, bool | str] = {
        "ID": plan.id, "LABEL": plan.label, "NUMBERS": plan.numbers, "METRIC": plan.metric,
        "LABEL_FORMAT": plan.label_format,
    }  # fmt: skip
    verify = "verify_numbers.py" if plan.numbers else "verify_classes.py"
    for name, template in (
        ("prepare.py", "prepare.py"), ("verify.py", verify), ("controls.py", "controls.py"),
    ):  # fmt: skip
        text = (source / template).read_text("utf-8")
        for constant, value in constants.items():
            text = _set_line(text, f"{constant} = ", _literal(value))
        (root / name).write_text(text, encoding="utf-8")
    answer = "number" if plan.numbers else "class"
    copy_harness(
        root / "harness",
        {"columns": {"id": "id", "label": plan.label}, "answer": answer},
        sentences=plan.sentences,
    )
    words = {
        "name": plan.name,
        "label": plan.label,
        "columns": ", ".join(f"`{name}`" for name in plan.features),
        "answers": "The answer is a number."
        if plan.numbers
        else "The answer is one of the labels of `train.csv`, letter by letter.",
        "metric": METRICS[plan.metric],
        "metric_name": plan.metric,
        "rows": plan.n_rows,
    }
    text = (source / "task.md").read_text("utf-8")
    (root / "task.md").write_text(Template(text).substitute(words), encoding="utf-8")
    facts = _facts(plan)
    _write_facts(root, facts)
    data.split(load_task(root), seed=data.GENERATED_SEED)
    task = load_task(root)
    scores = {
        split: {name: _control(task, name, split) for name in ("oracle", "null")}
        for split in checks.SPLITS
    }
    facts["splits"] = {
        split: sum(1 for _ in _open_rows(task.labels_dir(split) / "labels.csv"))
        for split in checks.SPLITS
    }
    facts["controls"] = {
        name: {split: scores[split][name] for split in checks.SPLITS} for name in ("oracle", "null")
    }
    _write_facts(root, facts)
    words |= {
        "dev": facts["splits"]["dev"],
        "test": facts["splits"]["test"],
        "oracle": f"{scores['test']['oracle']:g}",
        "null_test": f"{scores['test']['null']:.4g}",
    }
    text = (source / "README.md").read_text("utf-8")
    (root / "README.md").write_text(Template(text).substitute(words), encoding="utf-8")


def _facts(plan: Plan) -> dict[str, Any]:
    maximize = plan.metric == "accuracy"
    return {
        "name": plan.name,
        "version": 1,
        "title": f"Say the {plan.label} of each row of a table",
        "metric": {
            "name": plan.metric, "direction": "maximize" if maximize else "minimize",
            "floor": 0.0, "best": 1.0 if maximize else 0.0,
        },
        "submission": {"files": ["submission.csv"], "max_mib": 16},
        "splits": {"dev": 0, "test": 0},
        "limits": {"attempt_s": 120, "verify_s": 60, "memory_mib": 3072},
        "source": {"kind": "file", "licence": ""},
        "controls": {},
    }  # fmt: skip


def _write_facts(root: Path, facts: dict[str, Any]) -> None:
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, default_flow_style=None)
    (root / "task.yaml").write_text(text, encoding="utf-8")


def _control(task: Task, name: str, split: str) -> float:
    """The score of a control, to be documented."""
    controls, verify = task_module(task, "controls"), task_module(task, "verify").verify
    with tempfile.TemporaryDirectory(prefix="sia-control-") as folder:
        side = task.labels_dir(split) if name == "oracle" else task.public_dir
        getattr(controls, name)(side, Path(folder))
        return float(verify(Path(folder), task.labels_dir(split))["score"])


def _read(path: Path) -> list[dict[str, str]]:
    try:
        rows = list(_open_rows(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error
    if not rows or any(None in row or None in row.values() for row in rows):
        place = next((k for k, row in enumerate(rows, 2) if None in row or None in row.values()), 1)
        raise TaskError(
            f"{path}, row {place}: not as many cells as the header has, or no row at all"
        )
    return rows


def _open_rows(path: Path) -> Any:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < MAX_NUMBERS
    except ValueError:
        return False


def _make_up(path: Path) -> None:
    """Plants: whether one is sold depends on height and light together, on the pot, on the note."""
    rng = random.Random(0)
    notes = (
        "leaves a little brown at the tips",
        "fresh and strong with new shoots",
        "some small flies seen",
        "",
    )
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "height", "light", "pot", "note", "label"))
        for k in range(600):
            height, light = rng.uniform(5, 80), rng.uniform(0, 10)
            pot, note = rng.choice(("clay", "plastic", "tin")), rng.choice(notes)
            weight = math.sin(height / 12) * (light - 5) + (pot == "clay") + 2 * ("fresh" in note)
            label = "sold" if weight + rng.gauss(0, 0.7) > 0.8 else "left"
            shown = "" if rng.random() < 0.03 else f"{light:.1f}"
            writer.writerow((f"plant{k:03}", f"{height:.1f}", shown, pot, note, label))


def _shown(path: Path) -> Path:
    """A path as it is typed from here."""
    here = Path.cwd()
    resolved = path.resolve()
    return resolved.relative_to(here) if resolved.is_relative_to(here) else resolved


if __name__ == "__main__":
    sys.exit(main())
