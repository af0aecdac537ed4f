"""What a person or a model should read to see where the harness fails."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from classifiers import Labels
from rerank import best_labels
from texts import Cases
from views import Matrix

EXCERPT = 300  # characters
N_CANDIDATES = 5
N_NEIGHBOURS = 3


def write_trajectories(
    folder: Path, *, cases: Cases, gram: Matrix, scores: Matrix, lead: Matrix, count: int
) -> list[int]:
    """One file for each of the `count` items with the smallest lead, least certain first.

    Args:
        folder: Gets execution_q0.json and so on.
        cases: Train and items.
        gram: Similarities, shape (N, N), train first.
        scores: Shape (items, C).
        lead: Lead of the answer over the next label, shape (items,).
        count: Number of files.

    Returns:
        The positions of the items, in the order of the files.
    """
    worst = [int(i) for i in np.argsort(lead, kind="stable")[:count]]
    if not worst:
        return worst
    folder.mkdir(parents=True, exist_ok=True)
    n = len(cases.train_texts)
    order = best_labels(scores[worst], N_CANDIDATES)
    for k, item in enumerate(worst):
        neighbours = np.argsort(-gram[n + item, :n], kind="stable")[:N_NEIGHBOURS]
        messages = _messages(cases, item, order[k], scores[item], neighbours)
        path = folder / f"execution_q{k}.json"
        path.write_text(json.dumps(messages, ensure_ascii=False, indent=1), encoding="utf-8")
    return worst


def _messages(
    cases: Cases, item: int, order: Labels, scores: Matrix, neighbours: Labels
) -> Sequence[dict[str, str]]:
    text = cases.item_texts[item]
    excerpt = text if len(text) <= EXCERPT else f"{text[:EXCERPT]}… ({len(text)} characters)"
    candidates = "\n".join(
        f"{scores[label]:+.3f} {cases.labels[label]}" for label in order if scores[label] > -np.inf
    )
    similar = "\n".join(
        f"[{cases.labels[cases.answers[j]]}] {cases.train_texts[j][:EXCERPT]}" for j in neighbours
    )
    return [
        {"role": "user", "content": f"Item {cases.item_ids[item]}\n{excerpt}"},
        {"role": "tool", "content": f"Most similar training cases:\n{similar}"},
        {"role": "tool", "content": f"Candidates with their scores:\n{candidates}"},
        {"role": "assistant", "content": cases.labels[order[0]]},
    ]
