"""The task `denoising`: split, published figures by formula, guards, harness, on a tiny matrix."""

import importlib
import importlib.util
import io
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from sia.tasks import load_task

TASK = Path(__file__).parents[2] / "tasks" / "denoising"
HARNESS = TASK / "harness"
MODULES = tuple(path.stem for path in HARNESS.glob("*.py"))
CONFIG = yaml.safe_load((HARNESS / "harness.yaml").read_text(encoding="utf-8"))
NAMES = ("celltypist", "pbmc68k")
N_DEV, N_TEST = 20, 20 + 30  # cells
N_GENES = 200
LIMIT = 4 * 40 * N_GENES + 4096  # bytes of the first matrix

Matrix = NDArray[np.float64]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"denoising_{name}", TASK / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_module, verify_module, controls = load("prepare"), load("verify"), load("controls")


def made_up_counts(n_cells: int, n_genes: int, seed: int) -> NDArray[np.int64]:
    """Two cell types with programmes of their own, deep enough that no held-out cell is empty."""
    rng = np.random.default_rng(seed)
    programmes = rng.dirichlet(np.full(n_genes, 1.0), size=2)
    depth = rng.integers(150, 300, size=n_cells)
    programmes = 0.9 * programmes + 0.1 / n_genes
    return rng.poisson(programmes[np.arange(n_cells) % 2] * depth[:, None]).astype(np.int64)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return split(tmp_path_factory.mktemp("denoising"), seed=0)


def split(root: Path, *, seed: int) -> tuple[Path, Path]:
    matrices = {"celltypist": made_up_counts(40, N_GENES, 1), "pbmc68k": made_up_counts(30, 100, 2)}
    prepare_module.write_sides(matrices, root / "public", root / "private", seed=seed)
    return root / "public", root / "private"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- split


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(tmp_path / name, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_the_split_is_that_of_molecular_cross_validation() -> None:
    counts = made_up_counts(40, N_GENES, 1)
    counts[:, 7] = 0
    train, held = prepare_module.split_matrix(counts, seed=0)
    expressed = np.delete(counts, np.flatnonzero(counts.sum(0) == 0), axis=1)
    drawn = np.random.RandomState(0).binomial(expressed, 0.9)
    kept = drawn.sum(0) > 0
    assert (train == drawn[:, kept]).all()
    assert (train + held == expressed[:, kept]).all()
    assert 0.08 < held.sum() / counts.sum() < 0.12


def test_dev_and_sealed_cells_are_disjoint_and_cover_the_matrix(sides: tuple[Path, Path]) -> None:
    public, private = sides
    train, _ = prepare_module.read_counts(public / "celltypist.npz")
    dev = prepare_module.read_counts(private / "dev" / "celltypist.held.npz")[1]
    test = prepare_module.read_counts(private / "test" / "celltypist.held.npz")[1]
    assert sorted([*dev, *test]) == list(range(len(train)))
    assert not (private / "dev" / "pbmc68k.held.npz").exists()
    assert sorted(path.name for path in public.iterdir()) == [
        "celltypist.npz", "pbmc68k.npz", "task.md",
    ]  # fmt: skip


def test_a_second_split_of_the_same_cells_would_show_the_held_out_molecules(
    sides: tuple[Path, Path],
) -> None:
    counts = made_up_counts(40, N_GENES, 1)
    first, held = prepare_module.split_matrix(counts, seed=0)
    second, _ = prepare_module.split_matrix(counts, seed=1)
    logs, truth = verify_module.log_normalised, verify_module.log_normalised(held)
    error = ((logs(np.maximum(second - first, 0)) - truth) ** 2).mean()
    assert error < 0.8 * ((logs(first) - truth) ** 2).mean()
    assert len(list(sides[0].glob("*.npz"))) == len(NAMES)


def test_reveal_dev_gives_the_dev_cells_back_all_their_molecules(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    public, private = sides
    prepare_module.reveal_dev(public, private / "dev", tmp_path)
    before, _ = prepare_module.read_counts(public / "celltypist.npz")
    after, _ = prepare_module.read_counts(tmp_path / "celltypist.npz")
    held, rows = prepare_module.read_counts(private / "dev" / "celltypist.held.npz")
    assert (after[rows] == before[rows] + held).all()
    sealed = np.setdiff1d(np.arange(len(before)), rows)
    assert (after[sealed] == before[sealed]).all()
    for name in ("pbmc68k.npz", "task.md"):
        assert (tmp_path / name).read_bytes() == (public / name).read_bytes()


def test_counts_that_arithmetic_left_below_an_integer_are_not_truncated(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",G1,G2\nc1,2.9999999999999996,0.0\nc2,1,5\n")
    assert prepare_module.read_csv(tmp_path / "a.csv").tolist() == [[3, 0], [1, 5]]


@pytest.mark.parametrize(
    ("row", "message"),
    [("1.5,2", "integer counts"), ("-1,2", "not negative"), ("nan,2", "finite"), ("1", "1 counts")],
)
def test_what_are_not_counts_is_refused(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(f",G1,G2\nc1,{row}\n")
    with pytest.raises(ValueError, match=message):
        prepare_module.read_csv(tmp_path / "a.csv")


def test_counts_behind_logarithms_come_back(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="pip install -e '.[tasks]'")
    counts = np.array([[3, 0, 40], [1, 2, 0]])
    n_counts = np.array([100.0, 2000.0], np.float32)
    logs = np.log1p(counts / n_counts[:, None] * 1e4).astype(np.float32)
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        group = file.create_group("raw.X")
        group.attrs["h5sparse_shape"] = (2, 3)
        group["data"] = logs[counts > 0]
        group["indices"] = np.nonzero(counts)[1]
        group["indptr"] = np.array([0, 2, 4])
        file["obs"] = np.array([(n,) for n in n_counts], dtype=[("n_counts", "<f4")])
    assert (prepare_module.read_h5ad(tmp_path / "a.h5ad") == counts).all()


@pytest.mark.slow
def test_figures_of_the_real_matrix_at_the_official_seed() -> None:
    raw = TASK / "data" / "raw" / "sample_cell_by_gene.csv"
    if not raw.is_file():
        pytest.skip("no data: dvc repro fetch@denoising")
    train, held = prepare_module.split_matrix(prepare_module.read_csv(raw), seed=0)
    assert train.shape == (559, 9810)
    assert (train.sum(), held.sum()) == (3_257_641, 362_313)
    truth, plain = (verify_module.log_normalised(x) for x in (held, train))
    assert ((plain - truth) ** 2).mean() == pytest.approx(0.437141, abs=5e-7)
    assert verify_module.official_poisson(held, train, train) == pytest.approx(0.455573, abs=5e-7)
    assert verify_module.official_poisson(held, held, train) == pytest.approx(0.059463, abs=5e-7)


# --- metric


# Ends stored by TTT-Discover; rows of the Open Problems website: mse, poisson, their norms.
ENDS = {
    "pancreas": (0.304721, 0.257575, 0.031739),
    "pbmc": (0.270945, 0.300447, 0.043569),
    "tabula": (0.261763, 0.206542, 0.026961),
}
PUBLISHED = [
    ("pancreas", 0.2316, 0.0370, 0.240, 0.977),
    ("pancreas", 0.2314, 0.0370, 0.2405, 0.977),
    ("pancreas", 0.2319, 0.1243, 0.239, 0.590),
    ("pbmc", 0.1886, 0.0495, 0.304, 0.977),
    ("pbmc", 0.1888, 0.0495, 0.303, 0.977),
    ("pbmc", 0.1539, 0.0475, 0.432, 0.985),
    ("tabula", 0.1837, 0.0297, 0.298, 0.985),
    ("tabula", 0.1841, 0.0297, 0.296, 0.985),
    ("tabula", 0.1361, 0.0292, 0.480, 0.99),
]


@pytest.mark.parametrize(("data", "mse", "poisson", "mse_norm", "poisson_norm"), PUBLISHED)
def test_published_rows_follow_from_their_raw_values(
    data: str, mse: float, poisson: float, mse_norm: float, poisson_norm: float
) -> None:
    nothing_mse, nothing_poisson, perfect_poisson = ENDS[data]
    norm = verify_module.normalised
    # Raw values are printed to four digits: half a unit of the last one is 2e-4 of the norm.
    assert norm(mse, nothing=nothing_mse, perfect=0.0) == pytest.approx(mse_norm, abs=7e-4)
    found = norm(poisson, nothing=nothing_poisson, perfect=perfect_poisson)
    assert found == pytest.approx(poisson_norm, abs=3e-3)


def test_losses_equal_their_definitions_entry_by_entry() -> None:
    held, train = np.array([[1, 0], [2, 2]]), np.array([[9, 1], [20, 16]])
    scaled = train * 5 / 46
    swapped = [h - d * np.log(h + 1e-6) for h, d in zip(held.flat, scaled.flat, strict=True)]
    proper = [d - h * np.log(d + 1e-6) for h, d in zip(held.flat, scaled.flat, strict=True)]
    poisson = verify_module.official_poisson(held, train, train)
    assert poisson == pytest.approx(np.mean(swapped), abs=1e-12)
    assert verify_module.proper_poisson(held, train, train) == pytest.approx(np.mean(proper))
    logs = verify_module.log_normalised(held)
    assert logs[0] == pytest.approx([np.log1p(1e4), 0.0])
    assert not verify_module.log_normalised(np.zeros((1, 3))).any()


def test_error_does_not_depend_on_the_scale_of_a_cell_but_the_official_gate_does() -> None:
    train, held = prepare_module.split_matrix(made_up_counts(40, N_GENES, 1), seed=0)
    denoised = (train + train.mean(0)) / 2
    logs = verify_module.log_normalised
    assert logs(denoised * 1e-3) == pytest.approx(logs(denoised))
    ends = {
        "nothing": verify_module.official_poisson(held, train, train),
        "perfect": verify_module.official_poisson(held, held, train),
    }
    norms = [
        verify_module.normalised(
            verify_module.official_poisson(held, denoised * scale, train), **ends
        )
        for scale in (1.0, 1e-3)
    ]
    assert norms[0] < 0.9 < norms[1]
    # Read the right way round, the likelihood calls the same step a loss.
    right = [verify_module.proper_poisson(held, denoised * s, train) for s in (1.0, 1e-3)]
    assert right[0] < right[1]


@pytest.mark.parametrize(("side", "n_items"), [("dev", N_DEV), ("test", N_TEST)])
def test_controls_hit_the_ends(
    sides: tuple[Path, Path], tmp_path: Path, side: str, n_items: int
) -> None:
    public, private = sides
    labels = private / side
    for name, given, expected in (("oracle", labels, 1.0), ("null", public, 0.0)):
        getattr(controls, name)(given, tmp_path / name)
        result = verify_module.verify(tmp_path / name, labels)
        assert result["score"] == pytest.approx(expected, abs=1e-9)
        assert result["n_items"] == result["n_answered"] == len(result["items"]) == n_items


def test_score_is_the_mean_of_the_matrices_and_of_the_items(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    public, private = sides
    submit(tmp_path, smoothed(public))
    result = verify_module.verify(tmp_path, private / "test")
    each = [result["metrics"][f"mse_norm_{name}"] for name in NAMES]
    assert each[0] != pytest.approx(each[1])
    assert result["score"] == pytest.approx(np.mean(each))
    assert np.mean(list(result["items"].values())) == pytest.approx(result["score"])
    assert result["metrics"]["poisson_gain"] > 0
    assert not {name for name in result["breakdown"] if "/" in name}


# --- guards


def smoothed(public: Path) -> dict[str, Matrix]:
    result = {}
    for name in NAMES:
        train = prepare_module.read_counts(public / f"{name}.npz")[0].astype(float)
        share = train / train.sum(1, keepdims=True)
        result[name] = (share + share.mean(0)) / 2 * train.sum(1, keepdims=True)
    return result


def submit(folder: Path, matrices: dict[str, Matrix]) -> None:
    for name, matrix in matrices.items():
        controls.write(folder / f"{name}.npz", matrix)


@pytest.fixture
def refused(sides: tuple[Path, Path], tmp_path: Path) -> Callable[[str], None]:
    """Asserts that both splits refuse what lies in tmp_path."""

    def check(message: str) -> None:
        for side in ("dev", "test"):
            with pytest.raises(ValueError, match=message) as caught:
                verify_module.verify(tmp_path, sides[1] / side)
            assert "\n" not in str(caught.value)

    return check


def set_one(value: float) -> Callable[[Matrix], Matrix]:
    def change(matrix: Matrix) -> Matrix:
        matrix[3, 4] = value
        return matrix

    return change


GAMES: dict[str, tuple[Callable[[Matrix], Matrix], str]] = {
    "NaN": (set_one(np.nan), "cell 3 has values not finite"),
    "infinite": (set_one(np.inf), "not finite"),
    "beyond float32": (set_one(1e39), "not finite"),
    "negative": (set_one(-1e-3), "negative"),
    "a thousandth": (lambda m: m * 1e-3, "40 cells have a total outside"),
    "a tenth": (lambda m: m * 0.1, "total outside"),
    "tenfold": (lambda m: m * 10, "total outside"),
    "one shrunk cell": (
        lambda m: np.where(np.arange(len(m))[:, None] == 5, m * 0.01, m),
        "1 cells have a total outside",
    ),
    "empty": (np.zeros_like, "total outside"),
    "ones": (np.ones_like, "total outside"),
    "constant cells": (
        lambda m: np.repeat(m.mean(1, keepdims=True), m.shape[1], 1),
        "same value in every gene",
    ),
    "the average cell for all": (
        lambda m: np.repeat(m.mean(0, keepdims=True), len(m), 0) * 1e3,
        "total outside",
    ),
    "transposed": (lambda m: m.T, "shape"),
    "a cell less": (lambda m: m[:-1], "shape"),
    "a gene more": (lambda m: np.pad(m, ((0, 0), (0, 1))), "shape"),
    "flat": (lambda m: m.ravel(), "shape"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("game", GAMES)
def test_gaming_submissions_are_refused(
    sides: tuple[Path, Path], tmp_path: Path, refused: Callable[[str], None], game: str
) -> None:
    change, message = GAMES[game]
    matrices = smoothed(sides[0])
    matrices["celltypist"] = change(matrices["celltypist"])
    submit(tmp_path, matrices)
    refused(message)


def test_a_game_in_a_matrix_that_dev_does_not_score_is_refused_on_dev(
    sides: tuple[Path, Path], tmp_path: Path, refused: Callable[[str], None]
) -> None:
    matrices = smoothed(sides[0])
    submit(tmp_path, matrices | {"pbmc68k": matrices["pbmc68k"] * 1e-3})
    refused("pbmc68k.npz: 30 cells")


@pytest.mark.parametrize("scale", [0.001, 0.5, 2.0])
def test_scaled_copies_of_train_are_refused(
    sides: tuple[Path, Path], tmp_path: Path, refused: Callable[[str], None], scale: float
) -> None:
    trains = {n: prepare_module.read_counts(sides[0] / f"{n}.npz")[0] for n in NAMES}
    submit(tmp_path, {name: train * scale for name, train in trains.items()})
    refused("total outside")


def test_a_copy_of_train_scaled_within_the_band_gains_nothing(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    trains = {n: prepare_module.read_counts(sides[0] / f"{n}.npz")[0] for n in NAMES}
    submit(tmp_path, {name: train * 0.81 for name, train in trains.items()})
    assert verify_module.verify(tmp_path, sides[1] / "dev")["score"] == pytest.approx(0, abs=1e-6)


def test_a_missing_matrix_and_a_link_are_refused(
    sides: tuple[Path, Path], tmp_path: Path, refused: Callable[[str], None]
) -> None:
    submit(tmp_path, smoothed(sides[0]))
    (tmp_path / "pbmc68k.npz").unlink()
    refused("pbmc68k.npz is missing")
    (tmp_path / "pbmc68k.npz").symlink_to(sides[1] / "test" / "pbmc68k.held.npz")
    refused("not a plain file")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_a_pickle_is_refused_and_never_opened(
    sides: tuple[Path, Path], tmp_path: Path, refused: Callable[[str], None]
) -> None:
    submit(tmp_path, smoothed(sides[0]))
    mark = tmp_path / "opened"
    bait = np.empty((40, N_GENES), dtype=object)
    bait.fill(Payload(mark))
    for content in (npy(bait), pickle.dumps(Payload(mark))):
        with zipfile.ZipFile(tmp_path / "celltypist.npz", "w") as archive:
            archive.writestr("denoised.npy", content)
        refused("type object|no readable header")
    (tmp_path / "celltypist.npz").write_bytes(pickle.dumps(Payload(mark)))
    refused("not a readable npz")
    assert not mark.exists()


def test_broken_and_oversized_files_are_refused(
    sides: tuple[Path, Path], tmp_path: Path, refused: Callable[[str], None]
) -> None:
    submit(tmp_path, smoothed(sides[0]))
    path = tmp_path / "celltypist.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a readable npz")
    path.write_bytes(whole[:60] + bytes(40) + whole[100:])
    refused("celltypist.npz is not a readable npz|no readable header")
    path.write_bytes(b"")
    refused("not a readable npz")
    path.write_bytes(bytes(LIMIT + 1))
    refused(f"more than {LIMIT} bytes")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"denoised.npy": bytes(2**20)}, f"more than {LIMIT} bytes when unpacked"),
        ({"denoised.npy": b"x", "more.npy": b"x"}, "nothing else"),
        ({"other.npy": b"x"}, "nothing else"),
        ({}, "nothing else"),
        ({"denoised.npy": npy(np.ones((40, N_GENES)))}, f"more than {LIMIT} bytes|type float64"),
        ({"denoised.npy": npy(np.ones((40, N_GENES), np.int32))}, "type int32"),
        ({"denoised.npy": npy(np.ones((40, N_GENES), "U1"))}, "type <U1"),
        ({"denoised.npy": npy(np.ones((40, N_GENES), np.float32))[:-8]}, "cannot be read"),
        ({"denoised.npy": b"\x93NUMPY\x01\x00\xff\xff{"}, "no readable header"),
        ({"denoised.npy": b"\x93NUMPY\x09\x00"}, "no readable header"),
    ],
)
def test_archives_that_hold_something_else_are_refused(
    sides: tuple[Path, Path],
    tmp_path: Path,
    refused: Callable[[str], None],
    members: dict[str, bytes],
    message: str,
) -> None:
    submit(tmp_path, smoothed(sides[0]))
    with zipfile.ZipFile(tmp_path / "celltypist.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(message)


# --- harness


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, ModuleType]]:
    """The harness's modules by name; sys.path and sys.modules are put back afterwards."""
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(HARNESS))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(HARNESS))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


def with_changes(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(yaml.safe_dump(CONFIG))
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


@pytest.mark.slow
def test_magic_as_published_has_the_figures_known_from_elsewhere(
    harness: dict[str, ModuleType],
) -> None:
    # They were measured on counts truncated to integers, without restored totals.
    raw = TASK / "data" / "raw" / "sample_cell_by_gene.csv"
    if not raw.is_file():
        pytest.skip("no data: dvc repro fetch@denoising")
    with raw.open(encoding="utf-8") as file:
        next(file)
        rows = [np.array(line.rstrip().split(",")[1:], float).astype(np.int64) for line in file]
    train, held = prepare_module.split_matrix(np.stack(rows), seed=0)
    assert train.shape == (559, 9810)
    assert (train.sum(), held.sum()) == (3_006_576, 334_254)
    truth, plain = (verify_module.log_normalised(x) for x in (held, train))
    assert ((plain - truth) ** 2).mean() == pytest.approx(0.400943, abs=5e-7)
    assert verify_module.official_poisson(held, train, train) == pytest.approx(0.399465, abs=5e-7)
    assert verify_module.official_poisson(held, held, train) == pytest.approx(0.054493, abs=5e-7)

    ends = {
        "nothing": verify_module.official_poisson(held, train, train),
        "perfect": verify_module.official_poisson(held, held, train),
    }
    values, undo = harness["target_agent"].represent(
        train.astype(float), transform="sqrt", reversed_order=True
    )
    graph = harness["smooth"].Graph(**CONFIG["graph"])
    magic = undo(harness["smooth"].diffuse(values, graph)) * np.sqrt(train).sum(1, keepdims=True)
    error = ((verify_module.log_normalised(magic) - truth) ** 2).mean()
    assert 1 - error / ((plain - truth) ** 2).mean() == pytest.approx(0.227, abs=5e-4)
    poisson = verify_module.official_poisson(held, magic, train)
    assert verify_module.normalised(poisson, **ends) == pytest.approx(0.981, abs=5e-4)
    assert magic.sum() / train.sum() == pytest.approx(0.00025, abs=5e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"representation__reversed_order": False},
        {"representation__transform": "log"},
        {"representation__transform": "none", "representation__reversed_order": False},
        {"svd__use": True, "graph__use": False},
        {"factors__use": True, "graph__use": False},
        {"svd__use": True, "factors__use": True, "finish__expected_log": True},
        {"finish__power": 1.6, "finish__mean_weight": 0.2},
    ],
)
def test_every_piece_keeps_the_totals_and_passes_the_guards(
    harness: dict[str, ModuleType], changes: dict[str, Any]
) -> None:
    counts, _ = prepare_module.split_matrix(made_up_counts(40, N_GENES, 1), seed=0)
    config = with_changes(**changes)
    denoised = harness["target_agent"].denoise(counts.astype(float), config)
    verify_module.check_guards(denoised, counts, "made up")
    assert denoised.sum(1) == pytest.approx(counts.sum(1))


def test_without_a_smoother_or_with_an_unknown_transform_it_says_so(
    harness: dict[str, ModuleType],
) -> None:
    counts = made_up_counts(40, N_GENES, 1).astype(float)
    with pytest.raises(ValueError, match="at least one of"):
        harness["target_agent"].denoise(counts, with_changes(graph__use=False))
    with pytest.raises(ValueError, match="'cube' is none of"):
        harness["target_agent"].denoise(counts, with_changes(representation__transform="cube"))


def test_diffusion_steps_are_averages_over_similar_cells(harness: dict[str, ModuleType]) -> None:
    smooth = harness["smooth"]
    counts = made_up_counts(40, N_GENES, 1)
    values = np.sqrt(counts / counts.sum(1, keepdims=True))
    step = smooth.diffusion(values, smooth.Graph(**CONFIG["graph"]))
    assert np.asarray(step.sum(1)).ravel() == pytest.approx(1)
    same_type = np.arange(40)[:, None] % 2 == np.arange(40) % 2
    assert step.toarray()[same_type].sum() / 40 > 0.95


def test_low_rank_is_that_of_the_singular_values(harness: dict[str, ModuleType]) -> None:
    smooth = harness["smooth"]
    values = np.sqrt(made_up_counts(12, 30, 3))
    u, s, vt = np.linalg.svd(values, full_matrices=False)
    expected = np.maximum(u[:, :3] * s[:3] @ vt[:3], 0)
    found = smooth.low_rank(values, smooth.Svd(use=True, weight=1.0, rank=3))
    assert found == pytest.approx(expected, abs=1e-8)


def test_poisson_factors_gain_likelihood_with_every_round(harness: dict[str, ModuleType]) -> None:
    smooth = harness["smooth"]
    counts = made_up_counts(40, N_GENES, 1).astype(float)

    def loss(rounds: int) -> float:
        rate = smooth.poisson_factors(
            counts, smooth.Factors(use=True, weight=1.0, rank=3, rounds=rounds)
        )
        return float((rate - counts * np.log(rate + 1e-12)).sum())

    assert loss(20) < loss(5) < loss(1)


def test_expected_logarithm_is_that_of_many_draws(harness: dict[str, ModuleType]) -> None:
    rates = np.array([[1e-6, 0.003, 0.2, 4.0, 60.0, 400.0]])
    depth = np.array([[600.0]])
    draws = np.random.default_rng(0).poisson(np.repeat(rates, 400_000, 0))
    expected = np.log1p(draws * (1e4 / 600)).mean(0)
    found = harness["finish"].expected_log(rates / depth, depth)[0]
    assert found == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_the_program_answers_every_matrix_twice_alike(
    sides: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        work = tmp_path / name
        work.mkdir()
        command = [
            sys.executable, str(HARNESS / "target_agent.py"),
            "--dataset_dir", str(sides[0]), "--working_dir", str(work),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    for file in (*load_task(TASK).facts.submission.files, "agent_execution.json"):
        a, b = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert a == b
    result = verify_module.verify(tmp_path / "a", sides[1] / "test")
    assert result["n_answered"] == N_TEST
    assert result["metrics"]["total_ratio"] == pytest.approx(1, abs=1e-3)
