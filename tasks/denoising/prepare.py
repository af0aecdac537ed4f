"""Turn count matrices into the public side and the two private sides of `denoising`."""

import csv
import io
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import sparse

HERE = Path(__file__).parent
TRAIN_SHARE = 0.9  # of the molecules of every entry
DEV_SHARE = 0.5  # of the cells of the first matrix
SAME_DATE = (1980, 1, 1, 0, 0, 0)  # zip members carry a date; a seed must give the same bytes

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Where an h5ad file keeps its counts, and which of its cells are meant.

    Attributes:
        matrix: Places in the file; the first that is there counts.
        cells: Column of `obs` and the value that a cell must have in it; None for all cells.
    """

    matrix: tuple[str, ...]
    cells: tuple[str, str] | None = None


LAYOUTS = {  # of the sources in task.yaml, by name; each is one file <name>.h5ad
    "pancreas": Layout(("layers/counts",), cells=("tech", "inDrop1")),
    "pbmc_1k": Layout(("X",)),
    "tabula_lung": Layout(("raw/X", "raw.X")),
}


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Write `public/`, `private/dev/` and `private/test/`; same seed, same bytes.

    Each matrix is split once, by its molecules, as Open Problems does it. The cells of `celltypist`
    are then divided at random: the held-out molecules of one half are dev, those of the other half
    and of all `pbmc68k` are test. A further source is one matrix, whose cells are divided alike.

    Args:
        raw: Folder with sample_cell_by_gene.csv and pbmc68k_reduced.h5ad, or with the file of one
            further source.
        public: Gets celltypist.npz, pbmc68k.npz (train counts) and task.md; of a further source,
            its one matrix and its own task.md.
        private: Gets dev/ and test/, each with all train matrices and its held-out counts.
        seed: Of the official split of the first matrix; `pbmc68k` takes the next one.

    Raises:
        ValueError: A matrix cannot be read or does not hold counts, or a further source has not the
            number of cells that task.yaml states.
    """
    for name, layout in LAYOUTS.items():
        if (path := raw / f"{name}.h5ad").is_file():
            facts = yaml.safe_load((HERE / "task.yaml").read_text("utf-8"))["sources"][name]
            counts = read_layout(path, layout)
            if len(counts) != (stated := sum(facts["splits"].values())):
                raise ValueError(
                    f"{path.name} has {len(counts)} cells with counts where task.yaml states "
                    f"{stated}: this is another file. If you mean it, correct sources.{name}.splits"
                )
            text = HERE / facts["task_md"]
            write_sides({name: counts}, public, private, seed=seed, text=text)
            return
    matrices = {
        "celltypist": read_csv(raw / "sample_cell_by_gene.csv"),
        "pbmc68k": read_h5ad(raw / "pbmc68k_reduced.h5ad"),
    }
    write_sides(matrices, public, private, seed=seed)


def write_sides(
    matrices: dict[str, Counts],
    public: Path,
    private: Path,
    *,
    seed: int,
    text: Path = HERE / "task.md",
) -> None:
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
    shutil.copyfile(text, public / "task.md")


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
    with _open(path) as file:
        logs, cells = _matrix(file["raw.X"], None), file["obs"]["n_counts"][:]
    values = np.expm1(logs.toarray().astype(np.float64)) * np.asarray(cells)[:, None] / 1e4
    return _as_counts(values, path.name, tolerance=0.1)


def read_layout(path: Path, layout: Layout) -> Counts:
    """The counts in an h5ad file, without genes and then cells that have none, as in Open Problems.

    Reads matrices in CSR, CSC and dense form, and annotations as old and new versions of anndata
    write them.

    Raises:
        ValueError: The file has not this layout, or does not hold counts.
    """
    with _open(path) as file:
        place = next((place for place in layout.matrix if place in file), None)
        if place is None:
            raise ValueError(f"{path.name} has no matrix {' or '.join(layout.matrix)}")
        rows = None
        if layout.cells is not None:
            column, value = layout.cells
            rows = np.flatnonzero(_column(file, column, path.name) == value)
            if not len(rows):
                raise ValueError(f"{path.name} has no cell whose {column} is {value!r}")
        matrix = _matrix(file[place], rows)
    matrix = matrix[:, np.asarray(matrix.sum(0)).ravel() > 0]
    matrix = matrix[np.asarray(matrix.sum(1)).ravel() > 0]
    matrix.data = _as_counts(matrix.data.astype(np.float64), path.name, tolerance=1e-6)
    return matrix.toarray()  # type: ignore[no-any-return]


def _open(path: Path) -> Any:
    """An h5ad file, opened.

    Raises:
        ValueError: h5py is missing, or the file is none.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            f"h5py is needed to read {path.name}. Install it: pip install -e '.[tasks]'"
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path.name} is not an h5ad file: {error}") from None


def _matrix(node: Any, rows: NDArray[np.intp] | None) -> Any:
    """A matrix of an h5ad file, or some of its rows, in CSR form."""
    if hasattr(node, "shape"):  # dense: only what is needed is read
        return sparse.csr_matrix(node[:] if rows is None else node[rows])
    attributes = {key.removeprefix("h5sparse_"): node.attrs[key] for key in node.attrs}
    form = _text(attributes.get("encoding-type", attributes.get("format", "csr")))
    make = sparse.csc_matrix if form.startswith("csc") else sparse.csr_matrix
    shape = tuple(int(n) for n in attributes["shape"])
    matrix = make((node["data"][:], node["indices"][:], node["indptr"][:]), shape=shape).tocsr()
    return matrix if rows is None else matrix[rows]


def _column(file: Any, name: str, where: str) -> NDArray[Any]:
    """A column of `obs` as text, shape (cells,).

    A categorical one is a group of codes and categories; in files of anndata 0.7 the codes refer
    to `obs/__categories`; before, `obs` is one table and the categories lie in `uns`.
    """
    obs = file["obs"]
    if name not in (obs.dtype.names or () if hasattr(obs, "dtype") else obs):
        raise ValueError(f"{where} has no column {name!r} in obs")
    found = obs[name]
    if hasattr(found, "keys"):
        codes, categories = found["codes"][:], found["categories"][:]
    elif "categories" in getattr(found, "attrs", ()):
        codes, categories = found[:], file[found.attrs["categories"]][:]
    elif f"uns/{name}_categories" in file:
        codes, categories = found[:], file[f"uns/{name}_categories"][:]
    else:
        return np.array([_text(value) for value in found[:]], object)
    names = np.array([*map(_text, categories), ""], object)  # code -1: no value
    return names[codes]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


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
