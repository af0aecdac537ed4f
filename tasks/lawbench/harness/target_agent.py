"""Entry of the reference harness: reads harness.yaml beside it and answers every item.

One pass: texts, views, one Gram matrix, classifier, re-ranking if it is used, files.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from classifiers import Classifier, Labels, center, kernel_classifier, one_hot, prototypes
from policy import policy_folder, policy_scores
from rerank import Rerank, best_labels, choose, duels, name_overlap
from texts import Cases, Mask, read_cases
from trajectories import write_trajectories
from views import Matrix, Tfidf, View, gram_of_view

N_ALTERNATIVES = 5
SMOOTHER = 10  # ridge of the second opinion, in multiples of classifier.ridge


def main() -> None:
    """Read the two folders of the contract, write the submission and the trajectories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    config_file = Path(__file__).with_name("harness.yaml")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    cases = read_cases(args.dataset_dir)
    gram, scores = score_items(cases, config)
    write_submission(args.working_dir / "submission.csv", cases, scores)
    two_best = -np.sort(-scores, axis=1)[:, :2]
    write_trajectories(
        args.working_dir / "agent_execution",
        cases=cases,
        gram=gram,
        scores=scores,
        lead=two_best[:, 0] - two_best[:, 1],
        count=config["trajectories"],
    )


def score_items(cases: Cases, config: Mapping[str, Any]) -> tuple[Matrix, Matrix]:
    """Similarities of all texts (N, N), train first, and label scores of the items."""
    texts = cases.train_texts + cases.item_texts
    grams = [(view.weight, own) for view, own in view_grams(texts, config)]
    overlap = name_overlap(texts, cases.labels) if config["rerank"]["names"] else None
    folder = policy_folder() if config["policy"]["use"] else None
    return score_grams(
        grams,
        np.array(cases.answers),
        n_labels=len(cases.labels),
        config=config,
        overlap=overlap,
        policy=policy_scores(cases, folder) if folder else None,
    )


def view_grams(texts: Sequence[str], config: Mapping[str, Any]) -> list[tuple[View, Matrix]]:
    """The views in use, each with its similarities of all texts.

    Raises:
        ValueError: No view with a weight is in use.
    """
    views = [View(**view) for view in config["views"].values() if view["use"]]
    if not any(view.weight for view in views):
        raise ValueError("harness.yaml: no view is in use; set views.<name>.use for at least one")
    mask, shared = Mask(**config["mask"]), Tfidf(**config["tfidf"])
    # A view that only the second stage uses costs nothing while that is off.
    used = [view for view in views if view.weight or config["rerank"]["use"]]
    return [(view, gram_of_view(texts, view=view, tfidf=shared, mask=mask)) for view in used]


def score_grams(
    grams: Sequence[tuple[float, Matrix]],
    answers: Labels,
    *,
    n_labels: int,
    config: Mapping[str, Any],
    overlap: Matrix | None,
    policy: Matrix | None = None,
) -> tuple[Matrix, Matrix]:
    """The summed similarities and the label scores of the items.

    Args:
        grams: Weight and similarities of each view, train first.
        answers: Labels of the training texts.
        n_labels: C.
        config: Sections `classifier` and `rerank` are used.
        overlap: Evidence from the names of the labels, shape (N, C), for the second stage.
        policy: Log-probabilities under a trained policy, shape (N, C), cross-fitted on train, for
            the second stage.
    """
    settings, second = Classifier(**config["classifier"]), Rerank(**config["rerank"])
    two_stages = second.use or policy is not None
    if two_stages:
        # Leave-one-out scores are exact for ridge only; with the hinge they cost five points.
        settings = replace(settings, hinge_rounds=0)
    targets = one_hot(answers, n_labels)
    total = sum(weight for weight, _ in grams)
    gram = np.zeros_like(grams[0][1])
    for weight, own in grams:
        gram += np.float32(weight / total) * own
    if settings.center:
        gram = center(gram)
    first = kernel_classifier(gram, targets, settings=settings).stacked()
    if not two_stages:
        return gram, first[len(answers) :]

    opinions = [first]
    if second.views:
        opinions += [kernel_classifier(g, targets, settings=settings).stacked() for _, g in grams]
    if second.smooth:
        smoother = replace(settings, ridge=SMOOTHER * settings.ridge)
        opinions.append(kernel_classifier(gram, targets, settings=smoother).stacked())
    if second.prototypes:
        opinions.append(prototypes(gram, answers, n_labels).stacked())
    if overlap is not None:
        opinions.append(overlap)
    if policy is not None:
        opinions.append(policy)
    candidates = best_labels(first, second.top_k)
    evidence = [np.take_along_axis(opinion, candidates, 1) for opinion in opinions]
    if second.duels:
        evidence.append(duels(gram, answers, candidates, ridge=second.duel_ridge))
    choice = choose(candidates, evidence, answers, n_labels=n_labels, penalty=second.penalty)
    return gram, choice[len(answers) :]


def write_submission(path: Path, cases: Cases, scores: Matrix) -> None:
    """One row for each item: the best label, and the best five as alternatives."""
    order = best_labels(scores, N_ALTERNATIVES)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "label", "alternatives"])
        for item, best in zip(cases.item_ids, order, strict=True):
            names = [cases.labels[k] for k in best]
            writer.writerow([item, names[0], "|".join(names)])


if __name__ == "__main__":
    main()
