"""Free tests of every task folder: the controls hit the ends of the metric, and nothing leaks."""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sia.tasks.data import task_module
from sia.tasks.task import Task

SPLITS = ("dev", "test")


def controls(task: Task) -> Iterator[str]:
    """Runs the oracle and the null control on both splits; yields a line for each fault."""
    module, verify = task_module(task, "controls"), task_module(task, "verify").verify
    for split in SPLITS:
        labels = task.labels_dir(split)
        for name in ("oracle", "null"):
            expected = _expected(task, name, split)
            if expected is None:
                yield f"task.yaml documents no score of the {name} control on {split}"
                continue
            with tempfile.TemporaryDirectory(prefix="sia-control-") as folder:
                submission = Path(folder)
                side = labels if name == "oracle" else task.public_dir
                getattr(module, name)(side, submission)
                found = verify(submission, labels)
            low, high = expected
            if not low - 1e-9 <= found["score"] <= high + 1e-9:
                documented = low if low == high else f"{low!r} to {high!r}"
                yield f"{name} control on {split}: {found['score']!r}, documented {documented}"
            said = task.facts.splits[split]
            if found["n_items"] != said:
                yield f"{split} has {found['n_items']} items, task.yaml says {said}"


def leaks(task: Task) -> Iterator[str]:
    """Walks the public side for private files, or ids beside their private labels."""
    private = {path: path.read_bytes() for path in _files(task.private_dir)}
    answers = dict(_answers(private))
    for path in _files(task.public_dir):
        name, content = path.relative_to(task.public_dir), path.read_bytes()
        if path.is_symlink():
            yield f"public/{name} is a symbolic link"
        for secret, data in private.items():
            if _is_copy(secret, data, path, content, answers):
                continue
            if data.strip() and data.strip() in content:
                yield f"public/{name} holds {secret.relative_to(task.root)}"
        for number, row in enumerate(_rows(path, content), start=1):
            cells = set(row)
            for item in cells & answers.keys():
                if answers[item] in cells:
                    yield f"public/{name}, row {number}: {item!r} beside its private label"


def _is_copy(
    secret: Path, data: bytes, path: Path, content: bytes, answers: dict[str, str]
) -> bool:
    """Whether a private file repeats a public one and names no item, as a list of labels does."""
    if secret.name != path.name or data != content:
        return False
    text = data.decode("utf-8", errors="replace")
    return not any(item in text for item in answers)


def _expected(task: Task, name: str, split: str) -> tuple[float, float] | None:
    """The ends of what is documented: equal, unless the metric is measured and not computed."""
    documented: Any = task.facts.controls.get(name)
    if isinstance(documented, dict):
        documented = documented.get(split)
    if isinstance(documented, list):
        low, high = documented
        return float(low), float(high)
    return None if documented is None else (float(documented), float(documented))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _answers(private: dict[Path, bytes]) -> Iterator[tuple[str, str]]:
    """Item id -> label, from every private CSV file that has both columns."""
    for path, content in private.items():
        if path.suffix == ".csv":
            for row in csv.DictReader(content.decode("utf-8").splitlines()):
                if "id" in row and "label" in row:
                    yield row["id"], row["label"]


def _rows(path: Path, content: bytes) -> Iterator[list[str]]:
    """Rows of a public text file as cells; JSON and others are cut at quotes and commas."""
    text = content.decode("utf-8", errors="replace")
    if path.suffix == ".csv":
        yield from csv.reader(text.splitlines(keepends=True))
        return
    for line in text.splitlines():
        yield [cell.strip(" \t[]{}:") for cell in line.replace('"', ",").split(",")]
