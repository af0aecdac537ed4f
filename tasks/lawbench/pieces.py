"""What each piece of the harness is worth: cross-validated accuracy on the training file.

Run: python tasks/lawbench/pieces.py --data <public folder of lawbench>
"""

import argparse
import copy
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

HARNESS = Path(__file__).parent / "harness"
sys.path.insert(0, str(HARNESS))

from rerank import name_overlap  # noqa: E402
from target_agent import score_grams, view_grams  # noqa: E402
from texts import Cases, read_cases  # noqa: E402
from views import Matrix  # noqa: E402

Changes = dict[str, Any]

CHARS: Changes = {"views.words.use": False, "views.chars.use": True, "classifier.ridge": 0.1}
MASKED: Changes = {
    **CHARS,
    "mask.numbers": True,
    "mask.persons": True,
    "mask.courts": True,
    "tfidf.binary": True,
}
CLAUSES: Changes = {**MASKED, "views.clauses.use": True}
CENTERED: Changes = {**CLAUSES, "classifier.center": True}
HINGE: Changes = {**CENTERED, "classifier.hinge_rounds": 20}
# The second stage is learned from ridge scores: `classifier.hinge_rounds` is without effect there.
RERANKED: Changes = {**CENTERED, "rerank.use": True, "rerank.smooth": True}
WITH_WORDS: Changes = {
    **RERANKED,
    "views.words.use": True,
    "views.words.high": 2,
    "views.words.weight": 0.0,
}

# Each stage of the climb, and what was tried on top of it.
PIECES: dict[str, Changes] = {
    "newcomer: jieba words, ridge 1": {},
    "· ridge 0.1": {"classifier.ridge": 0.1},
    "· word pairs": {"views.words.high": 2, "classifier.ridge": 0.3},
    "characters 1-2, ridge 0.1": CHARS,
    "· ridge 1": {**CHARS, "classifier.ridge": 1.0},
    "· 1-3": {**CHARS, "views.chars.high": 3},
    "· first 600 characters only": {
        **CHARS,
        "views.chars.part": "head",
        "views.chars.chars": 600,
    },
    "· counted once": {**CHARS, "tfidf.binary": True},
    "· numbers masked": {**CHARS, "mask.numbers": True},
    "· persons masked": {**CHARS, "mask.persons": True},
    "masked, counted once": MASKED,
    "· dates masked too": {**MASKED, "mask.dates": True},
    "· idf power 0.5": {**MASKED, "tfidf.idf_power": 0.5},
    "· hinge, masked": {**MASKED, "classifier.hinge_rounds": 20},
    "· words in the sum": {**MASKED, "views.words.use": True, "views.words.weight": 0.5},
    "with clause pairs": CLAUSES,
    "· sentence pairs": {**CLAUSES, "views.sentences.use": True},
    "centered": CENTERED,
    "· sentence pairs, centered": {**CENTERED, "views.sentences.use": True},
    "hinge": HINGE,
    "· ridge 0.05": {**HINGE, "classifier.ridge": 0.05},
    "· ridge 0.3": {**HINGE, "classifier.ridge": 0.3},
    "· not centered": {**HINGE, "classifier.center": False},
    "· clauses 0.5": {**HINGE, "views.clauses.weight": 0.5},
    "· sentence pairs, hinge": {**HINGE, "views.sentences.use": True},
    "· idf power 0.5, hinge": {**HINGE, "tfidf.idf_power": 0.5},
    "second stage: views, duels, smooth score": RERANKED,
    "· without duels": {**RERANKED, "rerank.duels": False},
    "· without views": {**RERANKED, "rerank.views": False},
    "· three candidates": {**RERANKED, "rerank.top_k": 3},
    "· duel ridge 0.1": {**RERANKED, "rerank.duel_ridge": 0.1},
    "· duel ridge 1": {**RERANKED, "rerank.duel_ridge": 1.0},
    "· no smooth score": {**RERANKED, "rerank.smooth": False},
    "· prototypes": {**RERANKED, "rerank.prototypes": True},
    "· label names": {**RERANKED, "rerank.names": True},
    "· sentence pairs, second stage": {**RERANKED, "views.sentences.use": True},
    "words as evidence": WITH_WORDS,
    "· head and tail as evidence": {
        **WITH_WORDS,
        "views.head.use": True,
        "views.tail.use": True,
    },
    "all of the above": {
        **WITH_WORDS,
        "views.sentences.use": True,
        "views.head.use": True,
        "views.tail.use": True,
        "rerank.prototypes": True,
        "rerank.names": True,
    },
}


def main() -> None:
    """Print one line of a Markdown table for each piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", default="", help="pieces whose name contains this")
    args = parser.parse_args()
    cases = without_twins(read_cases(args.data))
    answers = np.array(cases.answers)
    fold = folds(answers, args.folds)
    base = yaml.safe_load((HARNESS / "harness.yaml").read_text(encoding="utf-8"))
    grams = GramStore(cases)
    print("| piece | accuracy | seconds a fold |\n| --- | --- | --- |", flush=True)
    for name, changes in PIECES.items():
        if args.only in name:
            config = changed(base, changes)
            start = time.perf_counter()
            score = cross_validate(grams, answers, fold, config, n_labels=len(cases.labels))
            seconds = (time.perf_counter() - start) / args.folds
            print(f"| {name} | {score:.4f} | {seconds:.1f} |", flush=True)


class GramStore:
    """Similarities of all texts, kept for the configs that share a view."""

    def __init__(self, cases: Cases) -> None:
        self.texts = cases.train_texts
        self.overlap = name_overlap(self.texts, cases.labels)
        self._kept: dict[str, Matrix] = {}

    def get(self, config: Mapping[str, Any]) -> list[tuple[float, Matrix]]:
        """Weight and similarities of each view that the config uses."""
        result = []
        for name, view in config["views"].items():
            if view["use"] and (view["weight"] or config["rerank"]["use"]):
                form = {**view, "weight": 1.0}
                key = repr((form, config["mask"], config["tfidf"]))
                if key not in self._kept:
                    alone = {**config, "views": {name: form}}
                    self._kept[key] = view_grams(self.texts, alone)[0][1]
                result.append((view["weight"], self._kept[key]))
        return result


def cross_validate(
    store: GramStore,
    answers: NDArray[np.intp],
    fold: NDArray[np.intp],
    config: Mapping[str, Any],
    *,
    n_labels: int,
) -> float:
    """Share of right answers over all texts, each answered by a fit without its fold."""
    grams = store.get(config)
    hits = 0
    for held_out in range(fold.max() + 1):
        train, items = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        order = np.concatenate([train, items])
        _, scores = score_grams(
            [(weight, gram[np.ix_(order, order)]) for weight, gram in grams],
            answers[train],
            n_labels=n_labels,
            config=config,
            overlap=store.overlap[order] if config["rerank"]["names"] else None,
        )
        hits += int((scores.argmax(1) == answers[items]).sum())
    return hits / len(answers)


def folds(answers: NDArray[np.intp], n_folds: int) -> NDArray[np.intp]:
    """A fold for each text, stratified by label."""
    rng = np.random.default_rng(0)
    fold = np.empty(len(answers), np.intp)
    for label in np.unique(answers):
        own = rng.permutation(np.flatnonzero(answers == label))
        fold[own] = (np.arange(len(own)) + rng.integers(n_folds)) % n_folds
    return fold


def without_twins(cases: Cases) -> Cases:
    """Each text once, so that no fold is answered by its own copy."""
    first = {text: i for i, text in reversed(list(enumerate(cases.train_texts)))}
    keep = sorted(first.values())
    return Cases(
        train_ids=[cases.train_ids[i] for i in keep],
        train_texts=[cases.train_texts[i] for i in keep],
        answers=[cases.answers[i] for i in keep],
        item_ids=[],
        item_texts=[],
        labels=cases.labels,
    )


def changed(base: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of the config with dotted paths set."""
    config = copy.deepcopy(dict(base))
    for path, value in changes.items():
        *groups, last = path.split(".")
        section = config
        for group in groups:
            section = section[group]
        section[last] = value
    return config


if __name__ == "__main__":
    main()
