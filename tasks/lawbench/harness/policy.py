"""What the weights lever has learned: label scores of a trained policy, read from a file.

The folder is named by the variable SIA_POLICY; without it there is no policy yet and nothing is
read. Legend: N texts (train first, then items), C labels.
"""

import os
import zipfile
from pathlib import Path

import numpy as np
from texts import Cases
from views import Matrix

FOLDER = "SIA_POLICY"
FILE = "scores.npz"


def policy_scores(cases: Cases, folder: Path) -> Matrix:
    """Log-probabilities of the labels, shape (N, C); those of a training text are cross-fitted.

    Args:
        cases: Train and items; an id that the policy does not know is an error.
        folder: Holds scores.npz with `ids` (n,), `labels` (C,) and `logprobs` (n, C).

    Raises:
        ValueError: The file is missing or damaged, or does not fit the cases.
    """
    path = folder / FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, labels, logprobs = (file[name] for name in ("ids", "labels", "logprobs"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no scores of a policy: {error}") from error
    column = {label: k for k, label in enumerate(labels.tolist())}
    row = {name: k for k, name in enumerate(ids.tolist())}
    wanted = cases.train_ids + cases.item_ids
    missing = [name for name in wanted if name not in row]
    if missing or sorted(column) != sorted(cases.labels):
        raise ValueError(f"{path}: made for other data: {len(missing)} ids or the labels differ")
    rows = np.array([row[name] for name in wanted])
    columns = np.array([column[label] for label in cases.labels])
    scores: Matrix = logprobs[np.ix_(rows, columns)].astype(np.float32)
    if not np.isfinite(scores).all():
        raise ValueError(f"{path}: scores are not finite")
    return scores


def policy_folder() -> Path | None:
    """Where the policy's scores lie; None while no policy has been trained."""
    name = os.environ.get(FOLDER)
    return Path(name) if name else None
