"""Turn the two count matrices into the public side and the two private sides of `denoising`."""

import csv
import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

HERE = Path(__file__).parent
TRAIN_SHARE = 0.9  # of the molecules of every entry
DEV_SHARE = 0.5  # of the cells of the first matrix
SAME_DATE = (1980, 1, 1, 0, 0, 0)  # zip members carry a date; a seed must give the same bytes

Counts = NDArray[np.int64]


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Write `public/`, `private/dev/` and `private/test/`; same seed, same bytes.

    Each matrix is split once, by its molecules, as Open Problems does it. The cells of `celltypist`
    are then divided at random: the held-out molecules of one half are dev, those of the other half
    and of all `pbmc68k` are test.

    Args:
        raw: Folder with sample_cell_by_gene.csv and pbmc68k_reduced.h5ad.
        public: Gets celltypist.npz, pbmc68k.npz (train counts) and task.md.
        private: Gets dev/ and test/, each with both train matrices and its held-out counts.
        seed: Of the official split of `celltypist`; `pbmc68k` takes the next one.

    Raises:
        ValueError: A matrix cannot be read or does not hold counts.
    """
    matrices = {
        "celltypist": read_csv(raw / "sample_cell_by_gene.csv"),
        "pbmc68k": read_h5ad(raw / "pbmc68k_reduced.h5ad"),
    }
    write_sides(matrices, public, private, seed=seed)


def write_sides(matrices: dict[str, Counts], public: Path, private: Path, *, seed: int) -> None:
    """Split the matrices and write all sides; the first matrix gives the dev cells."""
    for folder in (public, private / "dev", private / "test"):
        folder.mkdir(parents=True, exist_ok=True)
    for k, (name, counts) in enumerate(matrices.items()):
        train, held = split_matrix(counts, seed=seed + k)
        rng = np.random.default_rng([seed, k])
        order = rng.permutation(len(counts))  # files often list cells by type
        train, held = train[order], held[order]
        n_dev = round(DEV_SHARE * len(counts)) if k == 0 else 0
        cells = rng.permutation(len(counts))
        write_counts(public / f"{name}.npz", train)
        for side, rows in (("dev", cells[:n_dev]), ("test", cells[n_dev:])):
            write_counts(private / side / f"{name}.npz", train)
            if len(rows):
                rows = np.sort(rows)
                write_counts(private / side / f"{name}.held.npz", held[rows], rows=rows)
    shutil.copyfile(HERE / "task.md", public / "task.md")


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Write a public folder whose dev cells have all their molecules, for the last refit.

    Shapes, cells and files stay as they are. The sealed cells keep their train counts.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(public.iterdir()):
        held_file = private_dev / f"{path.stem}.held.npz"
        if path.suffix != ".npz" or not held_file.is_file():
            shutil.copyfile(path, out / path.name)
            continue
        counts, (held, rows) = read_counts(path)[0], read_counts(held_file)
        counts[rows] += held
        write_counts(out / path.name, counts)


def split_matrix(counts: Counts, *, seed: int) -> tuple[Counts, Counts]:
    """Train and held-out counts by molecular cross-validation, to the draw as in Open Problems.

    Genes without a molecule are dropped before the draw, genes without one in train after it. The
    draw is over the dense matrix of 64-bit integers: NumPy's legacy stream depends on it.
    """
    counts = np.ascontiguousarray(counts[:, counts.sum(0) > 0], np.int64)
    train = np.random.RandomState(seed).binomial(counts, TRAIN_SHARE).astype(np.int64)
    kept = train.sum(0) > 0
    return train[:, kept], (counts - train)[:, kept]


def read_csv(path: Path) -> Counts:
    """A CSV file with a row for each cell and a column for each gene.

    Raises:
        ValueError: A row has another length or holds something else than counts.
    """
    with path.open(encoding="utf-8", newline="") as file:
        n_genes = len(next(csv.reader(file))) - 1
        rows = list(_csv_rows(file, n_genes, path.name))
    return np.stack(rows)


def _csv_rows(file: io.TextIOBase | io.TextIOWrapper, n: int, name: str) -> Iterator[Counts]:
    for number, line in enumerate(file, start=2):
        cells = line.rstrip("\r\n").split(",")[1:]
        if len(cells) != n:
            raise ValueError(f"{name}, line {number}: {len(cells)} counts, not {n}")
        # The file was written by arithmetic: 2.9999999999999996 stands for 3 and must not become 2.
        values = np.array(cells, dtype=np.float64)
        yield _as_counts(values, f"{name}, line {number}", tolerance=1e-6)


def read_h5ad(path: Path) -> Counts:
    """The counts behind `raw.X` of scanpy's pbmc68k_reduced, a CSR matrix.

    The file keeps log1p(count / n_counts * 10,000) in single precision; `n_counts` of each cell is
    beside it, so the counts come back to the integer.

    Raises:
        ValueError: h5py is missing, or what comes back is far from integers.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            "h5py is needed to read pbmc68k_reduced.h5ad. Install it: pip install -e '.[tasks]'"
        ) from error
    with h5py.File(path, "r") as file:
        group, cells = file["raw.X"], file["obs"]["n_counts"]
        logs = sparse.csr_matrix(
            (group["data"][:], group["indices"][:], group["indptr"][:]),
            shape=tuple(int(n) for n in group.attrs["h5sparse_shape"]),
        )
    values = np.expm1(logs.toarray().astype(np.float64)) * np.asarray(cells)[:, None] / 1e4
    return _as_counts(values, path.name, tolerance=0.1)


def _as_counts(values: NDArray[np.float64], name: str, *, tolerance: float) -> Counts:
    counts = np.rint(values)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{name}: counts must be finite and not negative")
    if np.abs(values - counts).max(initial=0.0) > tolerance:
        raise ValueError(f"{name}: molecular cross-validation needs integer counts")
    return counts.astype(np.int64)


def write_counts(path: Path, counts: Counts, rows: Counts | None = None) -> None:
    """A sparse matrix as NumPy arrays without pickle; see task.md for the keys."""
    matrix = sparse.csr_matrix(counts)
    arrays = {
        "data": matrix.data.astype(np.int32),
        "indices": matrix.indices.astype(np.int32),
        "indptr": matrix.indptr.astype(np.int32),
        "shape": np.array(matrix.shape, np.int32),
    }
    if rows is not None:
        arrays["rows"] = rows.astype(np.int32)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", SAME_DATE), buffer.getvalue(), 8)


def read_counts(path: Path) -> tuple[Counts, Counts]:
    """Counts, shape (cells, genes), and the positions of these cells in the public matrix."""
    with np.load(path, allow_pickle=False) as file:
        shape = tuple(int(n) for n in file["shape"])
        matrix = sparse.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=shape)
        rows = file["rows"] if "rows" in file.files else np.arange(shape[0])
    return matrix.toarray().astype(np.int64), rows.astype(np.int64)
