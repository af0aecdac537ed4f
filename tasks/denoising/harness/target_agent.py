"""Entry of the reference harness: reads harness.yaml beside it and denoises every matrix.

One pass for each: proportions of the train counts, smoothers, their blend, finish, file.
"""

import argparse
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from finish import Finish, finish, rescaled
from scipy import sparse
from smooth import Factors, Graph, Matrix, Svd, diffuse, low_rank, poisson_factors


def main() -> None:
    """Read the two folders of the contract, write the submission and a short record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    config_file = Path(__file__).with_name("harness.yaml")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    record = []
    for path in sorted(args.dataset_dir.glob("*.npz")):
        counts = read_counts(path)
        denoised = denoise(counts, config)
        write_submission(args.working_dir / path.name, denoised)
        record.append({"role": "tool", "content": describe(path.stem, counts, denoised)})
    text = json.dumps(record, indent=1)
    (args.working_dir / "agent_execution.json").write_text(text, encoding="utf-8")


def denoise(counts: Matrix, config: Mapping[str, Any]) -> Matrix:
    """The denoised matrix, shape (C, G); every cell keeps its total.

    Args:
        counts: Train counts, shape (C, G), no empty cell.
        config: `harness.yaml`.

    Raises:
        ValueError: No smoother is in use.
    """
    totals = counts.sum(1, keepdims=True)
    values, undo = represent(counts, **config["representation"])
    graph, svd = Graph(**config["graph"]), Svd(**config["svd"])
    factors = Factors(**config["factors"])
    parts: list[tuple[float, Matrix]] = []
    if graph.use:
        parts.append((graph.weight, undo(diffuse(values, graph))))
    if svd.use:
        parts.append((svd.weight, undo(low_rank(values, svd))))
    if factors.use:
        parts.append((factors.weight, poisson_factors(counts, factors)))
    if not parts:
        raise ValueError("harness.yaml: use at least one of graph, svd and factors")
    one = np.ones_like(totals)
    weights = sum(weight for weight, _ in parts)
    blend = np.zeros_like(counts)
    for weight, part in parts:
        blend += weight / weights * rescaled(part, one)
    return finish(blend, totals, Finish(**config["finish"]))


def represent(counts: Matrix, *, transform: str, reversed_order: bool) -> tuple[Matrix, Any]:
    """The matrix that is smoothed, and the function that leads back to (unscaled) counts.

    Args:
        counts: Shape (C, G).
        transform: `sqrt`, `log` or `none`; the logarithm is taken of cells scaled to 10,000.
        reversed_order: Transform first, divide by the total of the transformed cell afterwards.

    Raises:
        ValueError: The transform is not known.
    """
    known = {
        "sqrt": (np.sqrt, np.square, 1.0),
        "log": (np.log1p, np.expm1, 1e4),
        "none": (np.positive, np.positive, 1.0),
    }
    if transform not in known:
        raise ValueError(f"harness.yaml: transform={transform!r} is none of {sorted(known)}")
    forward, back, depth = known[transform]
    if reversed_order:
        values = rescaled(forward(counts), np.ones((len(counts), 1)))
    else:
        values = forward(rescaled(counts, np.full((len(counts), 1), depth)))
    return values, back


def describe(name: str, counts: Matrix, denoised: Matrix) -> str:
    """What somebody who proposes the next step can use: no answer, only the shape of the result."""
    share = denoised / denoised.sum(1, keepdims=True)
    plain = counts / counts.sum(1, keepdims=True)
    top = np.sort(share, axis=1)[:, -10:].sum(1).mean()
    plain_top = np.sort(plain, axis=1)[:, -10:].sum(1).mean()
    return (
        f"{name}: {counts.shape[0]} cells x {counts.shape[1]} genes, median "
        f"{np.median(counts.sum(1)):.0f} molecules a cell, {np.mean(counts == 0):.1%} zeros. "
        f"The ten strongest genes of a cell hold {plain_top:.1%} of it before, {top:.1%} after; "
        f"{np.mean(share < 1e-6):.1%} of the entries are below one in a million."
    )


def read_counts(path: Path) -> Matrix:
    """Train counts, shape (C, G)."""
    with np.load(path, allow_pickle=False) as file:
        shape = tuple(int(n) for n in file["shape"])
        matrix = sparse.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=shape)
    return matrix.toarray().astype(np.float64)


def write_submission(path: Path, denoised: Matrix) -> None:
    """One array in half precision: the metric's logarithm moves by less than a thousandth.

    Values are counts, far below float16's 65,504 unless a cell has more molecules than that.
    """
    half = denoised.max() < np.finfo(np.float16).max
    buffer = io.BytesIO()
    array = denoised.astype(np.float16 if half else np.float32)
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    with zipfile.ZipFile(path, "w") as archive:
        member = zipfile.ZipInfo("denoised.npy")  # of a fixed date: the same input, the same bytes
        archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, 1)


if __name__ == "__main__":
    main()
