"""Score one submission of `denoising` on the held-out molecules of one split's cells."""

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

KEY = "denoised"
TOTALS_BAND = (0.8, 1.25)  # total of a denoised cell, in totals of its train counts
DEPTH = 1e4  # every cell is scaled to it before the logarithm
TINY = 1e-6  # of Open Problems' Poisson loss
OFFICIAL_GATE = 0.97  # of TTT-Discover, on poisson_norm
HEADER_BYTES = 4096
N_BINS = 4

Matrix = NDArray[np.float64]
Counts = NDArray[np.int64]


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Normalised mean squared error on the split's cells, averaged over its matrices.

    Every matrix of the submission is checked over all its cells, also those of the other split, so
    that what is accepted during a run is not refused in the exam.

    Args:
        submission_dir: Folder with one <matrix>.npz for each matrix (see task.md).
        labels_dir: Folder with <matrix>.npz, the train counts of all cells, and
            <matrix>.held.npz, the held-out counts of the split's cells.

    Returns:
        score, n_items, n_answered, metrics, symptoms, items and breakdown. An item is a cell: one
        minus its error over the matrix's error of doing nothing, weighted so that the plain mean
        over all items is the score.

    Raises:
        ValueError: A file is missing or cannot be read, or a guard is broken.
    """
    parts: dict[str, dict[str, Any]] = {}
    for path in sorted(labels_dir.glob("*.npz")):
        if path.name.endswith(".held.npz"):
            continue
        train, _ = read_counts(path)
        denoised = read_submission(submission_dir / path.name, train.shape)
        check_guards(denoised, train, path.name)
        held_path = labels_dir / f"{path.stem}.held.npz"
        if held_path.is_file():
            held, rows = read_counts(held_path)
            parts[path.stem] = _score(train[rows], held, denoised[rows], rows)
    n_items = sum(len(part["cells"]) for part in parts.values())
    items: dict[str, float] = {}
    for name, part in parts.items():
        weight = n_items / (len(parts) * len(part["cells"]))
        for row, value in zip(part["rows"], part["cells"], strict=True):
            items[f"{name}/{row:04}"] = float(weight * value)
    mean = {
        key: float(np.mean([part["metrics"][key] for part in parts.values()]))
        for key in next(iter(parts.values()))["metrics"]
    }
    each = {f"mse_norm_{name}": part["metrics"]["mse_norm"] for name, part in parts.items()}
    return {
        "score": mean["mse_norm"],
        "n_items": n_items,
        "n_answered": n_items,
        "metrics": {**mean, **each},
        "symptoms": {
            key: float(np.mean([part["symptoms"][key] for part in parts.values()]))
            for key in next(iter(parts.values()))["symptoms"]
        },
        "items": items,
        "breakdown": {name: part["breakdown"] for name, part in parts.items()},
    }


def read_submission(path: Path, shape: tuple[int, ...]) -> Matrix:
    """The one array of a submission's file, checked before it is unpacked.

    Raises:
        ValueError: One line that says what is wrong with the file.
    """
    name = path.name
    # A link could lead to the labels.
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{name} is missing or is not a plain file")
    limit = 4 * shape[0] * shape[1] + HEADER_BYTES
    if path.stat().st_size > limit:
        raise ValueError(f"{name} has more than {limit} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if [member.filename for member in members] != [f"{KEY}.npy"]:
                raise ValueError(f"{name} must hold one array called {KEY!r} and nothing else")
            if members[0].file_size > limit:
                raise ValueError(f"{name}: {KEY} has more than {limit} bytes when unpacked")
            content = archive.read(members[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"{name} is not a readable npz file: {error}") from None
    except RuntimeError as error:  # an encrypted member
        raise ValueError(f"{name} is not a readable npz file: {error}") from None
    dtype, found = _header(content, name)
    # Objects are pickles, which run code: they are refused by type before a byte is read.
    if dtype not in (np.dtype("<f2"), np.dtype("<f4")):
        raise ValueError(f"{name}: {KEY} has type {dtype}, not float16 or float32")
    if found != shape:
        raise ValueError(f"{name}: {KEY} has shape {found}, not {shape}")
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{name}: {KEY} cannot be read: {error}") from None
    return np.asarray(array, np.float64)


def _header(content: bytes, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    buffer = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(buffer)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(buffer, max_header_size=HEADER_BYTES)
    except (ValueError, KeyError, EOFError, SyntaxError, TypeError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: {KEY} has no readable header: {detail}") from None
    return dtype, shape


def check_guards(denoised: Matrix, train: Counts, name: str) -> None:
    """Refuses what cannot be a denoised count matrix.

    Raises:
        ValueError: The first guard that is broken, with the first cell that breaks it.
    """
    if not np.isfinite(denoised).all():
        raise ValueError(f"{name}: cell {_first(~np.isfinite(denoised))} has values not finite")
    if (denoised < 0).any():
        raise ValueError(f"{name}: cell {_first(denoised < 0)} has negative values")
    low, high = TOTALS_BAND
    share = denoised.sum(1) / train.sum(1)
    outside = (share < low) | (share > high)
    if outside.any():
        cell = int(outside.argmax())
        raise ValueError(
            f"{name}: {outside.sum()} cells have a total outside {low:g} to {high:g} times that of "
            f"their train counts; cell {cell} has {share[cell]:.4g} times"
        )
    flat = denoised.max(1) == denoised.min(1)
    if flat.any():
        raise ValueError(f"{name}: cell {int(flat.argmax())} has the same value in every gene")


def _first(mask: NDArray[np.bool_]) -> int:
    return int(mask.any(1).argmax())


def log_normalised(counts: NDArray[Any]) -> Matrix:
    """log1p of each cell scaled to 10,000; a cell without molecules stays zero."""
    totals = counts.sum(1, keepdims=True)
    scaled: Matrix = np.log1p(counts * (DEPTH / np.where(totals == 0, 1.0, totals)))
    return scaled


def official_poisson(held: NDArray[Any], prediction: NDArray[Any], train: NDArray[Any]) -> float:
    """Open Problems' Poisson loss, with its arguments in their order: lower is called better.

    The held-out counts stand where the rate belongs, so it measures no calibration: see README.
    """
    scaled = prediction * (held.sum() / train.sum())
    return float((held - scaled * np.log(held + TINY)).mean())


def proper_poisson(held: NDArray[Any], prediction: NDArray[Any], train: NDArray[Any]) -> float:
    """Negative log likelihood of the held-out counts, without its constant; lower is better."""
    rate = prediction * (held.sum() / train.sum())
    return float((rate - held * np.log(rate + TINY)).mean())


def normalised(value: float, *, nothing: float, perfect: float) -> float:
    """0 for doing nothing, 1 for the held-out counts themselves."""
    return (nothing - value) / (nothing - perfect)


def _score(train: Counts, held: Counts, denoised: Matrix, rows: Counts) -> dict[str, Any]:
    """Metrics, symptoms, breakdown and cells of one matrix."""
    truth, found = log_normalised(held), log_normalised(denoised)
    squares = (found - truth) ** 2  # (C, G)
    nothing = float(((log_normalised(train) - truth) ** 2).mean())
    poisson_ends = {
        "nothing": official_poisson(held, train, train),
        "perfect": official_poisson(held, held, train),
    }
    cells = 1 - squares.mean(1) / nothing
    mse, poisson = float(squares.mean()), official_poisson(held, denoised, train)
    mse_norm = normalised(mse, nothing=nothing, perfect=0.0)
    poisson_norm = normalised(poisson, **poisson_ends)
    zero = held == 0
    return {
        "rows": rows,
        "cells": cells,
        "metrics": {
            "mse_norm": mse_norm,
            "mse": mse,
            "poisson_norm": poisson_norm,
            "official_score": (mse_norm + poisson_norm) / 2,
            "official_gate": float(
                poisson_norm >= OFFICIAL_GATE and poisson >= poisson_ends["perfect"]
            ),
            "poisson_gain": proper_poisson(held, train, train)
            - proper_poisson(held, denoised, train),
            "total_ratio": float(denoised.sum() / train.sum()),
        },
        "symptoms": {
            "level_ratio": float(found.mean() / truth.mean()),
            "error_at_zeros_share": float(squares[zero].sum() / squares.sum()),
            "cell_spread": float(found.std(0).mean() / log_normalised(train).std(0).mean()),
        },
        "breakdown": {
            "mse_norm by depth of the cell, from shallow": _bins(cells, train.sum(1)),
            "error share by mean of the gene, from rare": _shares(squares.sum(0), train.sum(0)),
        },
    }


def _bins(values: Matrix, key: Counts) -> list[float]:
    order = np.argsort(key, kind="stable")
    return [round(float(part.mean()), 4) for part in np.array_split(values[order], N_BINS)]


def _shares(values: Matrix, key: Counts) -> list[float]:
    order, total = np.argsort(key, kind="stable"), values.sum()
    return [round(float(part.sum() / total), 4) for part in np.array_split(values[order], N_BINS)]


def read_counts(path: Path) -> tuple[Counts, Counts]:
    """Counts, shape (cells, genes), and the positions of these cells in the public matrix."""
    with np.load(path, allow_pickle=False) as file:
        shape = tuple(int(n) for n in file["shape"])
        matrix = sparse.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=shape)
        rows = file["rows"] if "rows" in file.files else np.arange(shape[0])
    return matrix.toarray().astype(np.int64), rows.astype(np.int64)
