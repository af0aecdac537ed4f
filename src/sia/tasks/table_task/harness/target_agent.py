"""Entry of the reference harness: reads harness.yaml beside it and answers every item.

One pass: two tables, features, models, files.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from columns import Row, Table, build, read
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

MANY_ROWS = 5000
DENSE_COLUMNS = 200  # trees get no more: sparse tables are projected


def main() -> None:
    """Reads the two folders of the contract, writes the submission and the trajectories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    config = yaml.safe_load(Path(__file__).with_name("harness.yaml").read_text(encoding="utf-8"))
    train = read(args.dataset_dir / config["files"]["train"])
    train = [row for row in train if row[config["columns"]["label"]]]
    items = read(args.dataset_dir / config["files"]["items"])
    table = build(train, items, config)
    labels = [row[config["columns"]["label"]] for row in train]
    if config["answer"] == "number":
        numbers = predict(table, np.array([float(label) for label in labels]), config)
        answers, doubt = [repr(float(number)) for number in numbers], None
    else:
        classes, places = np.unique(np.array(labels), return_inverse=True)
        chances = predict(table, places, config)
        doubt = 1 - chances.max(axis=1)
        answers = [str(classes[place]) for place in chances.argmax(axis=1)]
        if config["answer"] == "chance":
            answers = [repr(float(chance)) for chance in chances[:, -1]]
    write_submission(args.working_dir / "submission.csv", items, answers, config)
    folder = args.working_dir / "agent_execution"
    write_trajectories(folder, items, answers, doubt, config["trajectories"])


def predict(table: Table, truth: Any, config: Mapping[str, Any]) -> Any:
    """Numbers, or chances of each class, for the items: the mean over the models in use."""
    return np.mean(list(predictions(table, truth, config)), axis=0)


def predictions(table: Table, truth: Any, config: Mapping[str, Any]) -> Iterator[Any]:
    """What each model says."""
    kind, n = config["model"]["kind"], table.n_train
    number = config["answer"] == "number"
    if not number and len(set(truth.tolist())) == 1:
        yield np.ones((table.values.shape[0] - n, 1))
        return
    if kind in ("linear", "blend"):
        strength = config["linear"]["strength"]
        if number:
            center = truth.mean()
            model = Ridge(alpha=strength).fit(table.values[:n], truth - center)
            yield model.predict(table.values[n:]) + center
        else:
            model = LogisticRegression(C=1 / strength, max_iter=2000)
            yield model.fit(table.values[:n], truth).predict_proba(table.values[n:])
    if kind == "linear":
        return
    dense = dense_values(table)
    for seed in range(config["model"]["bags"]):
        for name in ("boost", "forest"):
            if kind in (name, "blend"):
                # Threads that wait for each other cost more than small tables give them to do.
                with threadpool_limits(1 if n < MANY_ROWS else None, user_api="openmp"):
                    model = tree_model(name, number, config, seed).fit(dense[:n], truth)
                    yield model.predict(dense[n:]) if number else model.predict_proba(dense[n:])


def tree_model(name: str, number: bool, config: Mapping[str, Any], seed: int) -> Any:
    """Boosted trees or a forest, not yet trained."""
    settings = config[name]
    if name == "boost":
        boost = HistGradientBoostingRegressor if number else HistGradientBoostingClassifier
        return boost(
            learning_rate=settings["learning_rate"],
            max_iter=int(settings["rounds"]),
            max_leaf_nodes=settings["leaves"],
            min_samples_leaf=settings["min_leaf"],
            l2_regularization=settings["l2"],
            early_stopping=False,
            random_state=seed,
        )
    forest = RandomForestRegressor if number else RandomForestClassifier
    return forest(
        n_estimators=settings["trees"],
        min_samples_leaf=settings["min_leaf"],
        max_features=settings["columns"],
        n_jobs=2,
        random_state=seed,
    )


def dense_values(table: Table) -> Any:
    """The features for trees; a wide table is projected to its main directions."""
    if table.values.shape[1] <= DENSE_COLUMNS:
        return table.values.toarray()
    directions = min(DENSE_COLUMNS, table.values.shape[0] - 1)
    return TruncatedSVD(directions, random_state=0).fit_transform(table.values)


def write_submission(
    path: Path, items: Sequence[Row], answers: Sequence[str], config: Mapping[str, Any]
) -> None:
    """One row for each item."""
    name, label = config["columns"]["id"], config["columns"]["label"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([name, label])
        for row, answer in zip(items, answers, strict=True):
            writer.writerow([row[name], answer])


def write_trajectories(
    folder: Path, items: Sequence[Row], answers: Sequence[str], doubt: Any, count: int
) -> None:
    """One file for each of the `count` items whose answer is least certain."""
    if doubt is None or not count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for k, place in enumerate(np.argsort(-doubt, kind="stable")[:count].tolist()):
        messages = [
            {"role": "user", "content": json.dumps(items[place], ensure_ascii=False)},
            {"role": "assistant", "content": f"{answers[place]} (doubt {doubt[place]:.3f})"},
        ]
        path = folder / f"execution_q{k}.json"
        path.write_text(json.dumps(messages, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
