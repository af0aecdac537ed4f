"""Further sources of `denoising`, made up and served over HTTP: fetched, split, run, examined."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy import sparse

from sia import exam, rundir
from sia.errors import TaskError
from sia.provenance import tree_sha256
from sia.tasks import Task, checks, data, load_task
from sia.tasks.__main__ import main

h5py = pytest.importorskip("h5py", reason="pip install -e '.[tasks]'")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tasks" / "denoising"
N_CELLS, N_GENES = 60, 80
SOURCES = ("pancreas", "pbmc_1k", "tabula_lung")


def made_up_counts(seed: int) -> NDArray[np.int64]:
    """Two cell types, deep enough that no held-out cell is empty; all genes are expressed."""
    rng = np.random.default_rng(seed)
    programmes = 0.9 * rng.dirichlet(np.ones(N_GENES), size=2) + 0.1 / N_GENES
    depth = rng.integers(400, 800, size=N_CELLS)
    counts = rng.poisson(programmes[np.arange(N_CELLS) % 2] * depth[:, None]) + 1
    return counts.astype(np.int64)


def with_blanks(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same with a gene and a cell that have no counts."""
    return np.insert(np.insert(counts, 5, 0, axis=1), 7, 0, axis=0)


def put_sparse(file: Any, place: str, matrix: Any, *, old: bool = False) -> None:
    group = file.create_group(place)
    for part in ("data", "indices", "indptr"):
        group[part] = getattr(matrix, part)
    if old:
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = matrix.format, matrix.shape
    else:
        group.attrs["encoding-type"], group.attrs["shape"] = f"{matrix.format}_matrix", matrix.shape


def write_pancreas(path: Path, counts: NDArray[np.int64], *, form: str = "group") -> None:
    """Counts of inDrop1 between cells of another technology, which alone has the last gene."""
    both = np.zeros((2 * len(counts), counts.shape[1] + 1))
    both[::2, :-1] = counts
    both[1::2, -1] = 2.5  # no counts: they must not be looked at
    codes = np.where(np.arange(len(both)) % 2 == 0, 1, 0).astype(np.int8)
    names = np.array([b"celseq", b"inDrop1"], object)
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        file["X"] = np.log1p(both)
        if form == "group":
            put_sparse(file, "layers/counts", sparse.csr_matrix(both))
            file["obs/tech/codes"], file["obs/tech/categories"] = codes, names.astype(text)
        elif form == "reference":
            file["layers/counts"] = both
            file["obs/__categories/tech"] = names.astype(text)
            file["obs/tech"] = codes
            file["obs/tech"].attrs["categories"] = file["obs/__categories/tech"].ref
        elif form == "table":
            put_sparse(file, "layers/counts", sparse.csc_matrix(both), old=True)
            file["obs"] = np.array([(code,) for code in codes], dtype=[("tech", "i1")])
            file["uns/tech_categories"] = names.astype(text)
        else:
            put_sparse(file, "layers/counts", sparse.csc_matrix(both))
            file["obs/tech"] = names[codes].astype(text)


def write_pbmc_1k(path: Path, counts: NDArray[np.int64]) -> None:
    with h5py.File(path, "w") as file:
        put_sparse(file, "X", sparse.csr_matrix(counts.astype(np.float32)))


def write_tabula_lung(path: Path, counts: NDArray[np.int64], *, old: bool = False) -> None:
    with h5py.File(path, "w") as file:
        put_sparse(file, "X", sparse.csr_matrix(np.log1p(counts)))
        matrix = sparse.csr_matrix(counts.astype(np.float32))
        put_sparse(file, "raw.X" if old else "raw/X", matrix, old=old)


WRITERS: Mapping[str, Callable[[Path, NDArray[np.int64]], None]] = {
    "pancreas": write_pancreas, "pbmc_1k": write_pbmc_1k, "tabula_lung": write_tabula_lung,
}  # fmt: skip


class Served:
    """A folder over HTTP on the loopback interface; names may misbehave."""

    def __init__(self, folder: Path) -> None:
        served = self
        self.folder, self.asked = folder, 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.asked += 1
                kind, _, name = self.path[1:].partition("/")
                path = folder / name
                if kind == "moved":
                    self.send_response(302)
                    self.send_header("Location", f"/plain/{name}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if not path.is_file():
                    self.send_error(404)
                    return
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if kind == "broken":
                    self.wfile.write(content[:100])
                elif kind == "slow":
                    for k in range(40):
                        self.wfile.write(content[k : k + 1])
                        self.wfile.flush()
                        time.sleep(0.05)
                else:
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "served"
    folder.mkdir()
    for k, (name, write) in enumerate(WRITERS.items()):
        write(folder / f"{name}.h5ad", with_blanks(made_up_counts(k)))
    server = Served(folder)
    yield server
    server.close()


@pytest.fixture
def folder(served: Served, tmp_path: Path) -> Path:
    """A copy of the task whose sources are the served files, all of kind `url`."""
    root = tmp_path / "checkout" / "tasks" / "denoising"
    shutil.copytree(FOLDER, root, ignore=shutil.ignore_patterns("data", "__pycache__"))
    for name in SOURCES:
        change(
            root, name, splits={"dev": N_CELLS // 2, "test": N_CELLS // 2},
            source={"kind": "url", "url": f"{served.url}/plain/{name}.h5ad"},
        )  # fmt: skip
    return root


def change(root: Path, name: str, *, source: dict[str, Any], **facts: Any) -> Task:
    path = root / "task.yaml"
    found = yaml.safe_load(path.read_text("utf-8"))
    found["sources"][name].update(facts)
    found["sources"][name]["source"].update(source)
    path.write_text(yaml.safe_dump(found), "utf-8")
    return load_task(root, name)


def remains(task: Task) -> list[str]:
    return sorted(path.name for path in task.raw_dir.iterdir())


# --- sources of a task


def test_a_source_changes_the_facts_and_keeps_data_of_its_own(folder: Path) -> None:
    own, further = load_task(folder), load_task(folder, "pancreas")
    assert (own.name, further.name) == ("denoising", "denoising@pancreas")
    assert further.facts.submission.files == ("pancreas.npz",)
    assert further.facts.limits != own.facts.limits
    assert further.facts.metric == own.facts.metric
    assert further.text != own.text
    assert own.public_dir == folder / "data" / "public"
    place = folder / "data" / "sources" / "pancreas"
    assert further.public_dir == place / "public"
    assert further.labels_dir("dev") == place / "private" / "dev"
    assert own.stage("split") == "split@denoising"
    assert further.stage("split") == "tasks/denoising/dvc.yaml:split@pancreas"


def test_an_unknown_source_is_one_message_with_the_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", str(folder), "--source", "nonsense"]) == 2
    assert "has no source 'nonsense'. Its further sources: pancreas, pbmc_1k, tabula_lung" in (
        capsys.readouterr().err
    )
    assert main(["check", str(ROOT / "tasks" / "toy"), "--source", "pancreas"]) == 2
    assert "It has none" in capsys.readouterr().err


def test_missing_data_of_a_source_name_its_own_stage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_task(folder, "pbmc_1k")
    with pytest.raises(TaskError, match=r"dvc repro tasks/denoising/dvc\.yaml:fetch@pbmc_1k"):
        data.split(task, seed=0)
    with pytest.raises(TaskError, match=r"dvc repro tasks/denoising/dvc\.yaml:split@pbmc_1k"):
        data.ensure(task, ask=False)
    assert main(["check", str(folder), "--source", "pbmc_1k"]) == 2
    assert "dvc repro tasks/denoising/dvc.yaml:split@pbmc_1k" in capsys.readouterr().err


# --- fetching one file


def test_a_file_comes_over_http_and_its_hash_is_kept_beside_it(
    folder: Path, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    task = change(folder, "pancreas", source={"url": f"{served.url}/moved/pancreas.h5ad"})
    assert main(["fetch", str(folder), "--source", "pancreas"]) == 0
    content = (served.folder / "pancreas.h5ad").read_bytes()
    found = hashlib.sha256(content).hexdigest()
    assert (task.raw_dir / "pancreas.h5ad").read_bytes() == content
    assert (task.raw_dir / "pancreas.h5ad.sha256").read_text() == f"{found}  pancreas.h5ad\n"
    said = capsys.readouterr()
    assert str(task.raw_dir) in said.out
    assert f"sha256 {found} (task.yaml names none to compare it with)" in said.err
    asked = served.asked
    data.fetch(task)
    assert served.asked == asked
    assert remains(task) == ["pancreas.h5ad", "pancreas.h5ad.sha256"]


def test_the_right_hash_is_taken_and_a_wrong_one_leaves_nothing(
    folder: Path, served: Served
) -> None:
    task = change(folder, "pancreas", source={"sha256": "00ff"})
    with pytest.raises(TaskError, match=r"not 00ff as task\.yaml says"):
        data.fetch(task)
    assert remains(task) == []
    right = hashlib.sha256((served.folder / "pancreas.h5ad").read_bytes()).hexdigest()
    data.fetch(change(folder, "pancreas", source={"sha256": right}))
    assert "pancreas.h5ad" in remains(task)
    with pytest.raises(TaskError, match=r"pancreas\.h5ad has sha256 .* not 00ff"):
        data.fetch(change(folder, "pancreas", source={"sha256": "00ff"}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent/of", "404 Not Found"),
        ("broken", "could not be fetched|broke off after"),
        ("slow", r"within 0\.5 s"),
    ],
)
def test_a_file_that_does_not_come_leaves_nothing_and_names_another_way(
    folder: Path, served: Served, kind: str, message: str
) -> None:
    task = change(folder, "pancreas", source={"url": f"{served.url}/{kind}/pancreas.h5ad"})
    with pytest.raises(TaskError, match=message) as raised:
        data.fetch(task, deadline_s=0.5 if kind == "slow" else 60)
    assert f"put it at {task.raw_dir / 'pancreas.h5ad'}" in str(raised.value)
    assert remains(task) == []


def test_a_server_that_is_not_there_is_named(folder: Path, served: Served) -> None:
    task = change(folder, "pancreas", source={"url": "http://127.0.0.1:1/pancreas.h5ad"})
    with pytest.raises(TaskError, match=r"http://127\.0\.0\.1:1/pancreas\.h5ad could not be fet"):
        data.fetch(task)


def test_a_file_that_somebody_has_is_taken_from_the_named_place(
    folder: Path, served: Served
) -> None:
    task = change(folder, "tabula_lung", source={"kind": "by_hand", "url": "https://example.org"})
    place = task.raw_dir / "tabula_lung.h5ad"
    with pytest.raises(TaskError, match="have to be fetched by hand") as raised:
        data.fetch(task)
    assert f"From https://example.org. Put the file at {place}" in str(raised.value)
    shutil.copy(served.folder / "tabula_lung.h5ad", place)
    data.fetch(task)
    assert remains(task) == ["tabula_lung.h5ad", "tabula_lung.h5ad.sha256"]
    assert served.asked == 0


# --- reading and splitting


@pytest.mark.parametrize("form", ["group", "reference", "table", "text"])
def test_cells_of_one_technology_are_found_however_they_are_written(
    folder: Path, form: str
) -> None:
    prepare = data.task_module(load_task(folder), "prepare")
    path, counts = folder / "pancreas.h5ad", made_up_counts(3)
    write_pancreas(path, with_blanks(counts), form=form)
    found = prepare.read_layout(path, prepare.LAYOUTS["pancreas"])
    assert found.dtype == np.int64
    assert (found == counts).all()


def test_counts_behind_normalised_values_are_read_from_old_and_new_files(folder: Path) -> None:
    prepare = data.task_module(load_task(folder), "prepare")
    path, counts = folder / "tabula_lung.h5ad", made_up_counts(4)
    for old in (False, True):
        write_tabula_lung(path, with_blanks(counts), old=old)
        assert (prepare.read_layout(path, prepare.LAYOUTS["tabula_lung"]) == counts).all()


def test_another_file_is_refused_with_what_is_wrong_with_it(folder: Path) -> None:
    task = load_task(folder, "pancreas")
    task.raw_dir.mkdir(parents=True)
    path = task.raw_dir / "pancreas.h5ad"

    def refused(message: str) -> None:
        with pytest.raises(TaskError, match=message):
            data.split(task, seed=0)
        assert not task.has_data()

    path.write_bytes(b"<html>")
    refused("pancreas.h5ad is not an h5ad file")
    write_pbmc_1k(path, made_up_counts(0))
    refused("has no matrix layers/counts")
    write_pancreas(path, made_up_counts(0)[:40])
    refused("has 40 cells with counts where task.yaml states 60")
    with h5py.File(path, "r+") as file:
        file["layers/counts/data"][:] = 1.5
    refused("integer counts")
    with h5py.File(path, "r+") as file:
        file["obs/tech/codes"][:] = 0
    refused("no cell whose tech is 'inDrop1'")
    with h5py.File(path, "r+") as file:
        del file["obs/tech"]
        file["obs/other"] = [0]
    refused("no column 'tech'")


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_fetched_split_and_answered(folder: Path, name: str, tmp_path: Path) -> None:
    for command in (["fetch"], ["split", "--seed", "0"], ["check"]):
        assert main([command[0], str(folder), "--source", name, *command[1:]]) == 0
    task = load_task(folder, name)
    assert list(checks.controls(task)) == []  # 1.0 for the oracle, 0.0 for the null control
    assert sorted(path.name for path in task.public_dir.iterdir()) == [f"{name}.npz", "task.md"]
    assert (task.public_dir / "task.md").read_bytes() == task.text.read_bytes()
    assert not load_task(folder).has_data()

    work = tmp_path / "work"
    work.mkdir()
    command = [
        sys.executable, str(task.reference_harness / "target_agent.py"),
        "--dataset_dir", str(task.public_dir), "--working_dir", str(work),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=60)
    for file in task.facts.submission.files:
        assert (work / file).is_file()
    found = data.task_module(task, "verify").verify(work, task.labels_dir("test"))
    assert found["n_items"] == task.facts.splits["test"]
    assert found["score"] > 0


# --- DVC


def test_dvc_makes_a_source_on_demand_and_puts_it_into_no_store(
    folder: Path, served: Served
) -> None:
    root = folder.parents[1]
    (root / "dvc.yaml").write_text("stages: {other: {cmd: touch other, outs: [other]}}")
    shutil.copy(ROOT / "params.yaml", root)
    (root / ".gitignore").write_text("/tasks/*/data/\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc" / "config")
    task = load_task(folder, "pancreas")
    assert "Running stage 'other'" in dvc(root, "repro")
    assert served.asked == 0
    # One that somebody has put there is not lost when the stage runs.
    task.raw_dir.mkdir(parents=True)
    shutil.copy(served.folder / "pancreas.h5ad", task.raw_dir)
    assert "split@pancreas" in dvc(root, "repro", task.stage("split"))
    assert served.asked == 0
    assert task.has_data()
    assert "Running" not in dvc(root, "repro", task.stage("split"))

    # Neither the sources that nobody has made nor this one concern the others.
    dvc(root, "push")
    (root / "other").unlink()
    dvc(root, "pull")
    assert (root / "other").is_file()
    store = root.parent / "sia-store"
    assert not [path for path in store.rglob("*") if path.suffix == ".dir"]
    before = tree_sha256(task.public_dir)
    shutil.rmtree(task.public_dir)
    dvc(root, "repro", task.stage("split"))
    assert tree_sha256(task.public_dir) == before


def dvc(root: Path, *args: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *args],
        cwd=root, env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- runs


def sia(where: Path, *args: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sia", *args, "tracking=none", "sandbox=process"],
        cwd=where, capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_its_continuation_and_its_exam_open_the_same_source(
    folder: Path, tmp_path: Path
) -> None:
    task = load_task(folder, "pbmc_1k")
    data.fetch(task)
    data.split(task, seed=0)
    run = tmp_path / "run"
    said = sia(
        tmp_path, "task=denoising", f"task.dir={folder}", "task.source=pbmc_1k", "generations=1",
        f"hydra.run.dir={run}",
    )  # fmt: skip
    assert "denoising@pbmc_1k" in said
    sia(tmp_path, f"resume={run}", "generations=2")
    info, result = rundir.read_info(run), rundir.read_result(run)
    assert (info.task, info.run_id.split("-")[0]) == ("denoising@pbmc_1k", "denoising@pbmc_1k")
    assert result is not None
    assert result.generations == 2
    submission = run / "gen-001" / "cand-0" / "submission"
    assert [path.name for path in submission.iterdir()] == ["pbmc_1k.npz"]

    found = exam.examine(run)
    assert found.task == "denoising@pbmc_1k"
    assert found.n_items == N_CELLS // 2
    best = next(row for row in found.rows if row.name == "best by dev")
    assert {item.split("/")[0] for item in best.items} == {"pbmc_1k"}
    done = subprocess.run(
        [sys.executable, "-m", "sia.exam", str(run)],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "published: TTT-Discover" in done.stdout
    assert json.loads((run / "exam.json").read_bytes())["task"] == "denoising@pbmc_1k"


def test_a_source_that_is_not_there_ends_the_command_with_one_message(tmp_path: Path) -> None:
    said = sia(tmp_path, "task=denoising", "task.source=nonsense", code=2)
    assert said.startswith("sia: Task 'denoising' has no source 'nonsense'. Its further sources: ")
    assert "Traceback" not in said
    said = sia(tmp_path, "task=external", f"task.dir={FOLDER}", "task.source=pancreas", code=2)
    assert "Traceback" not in said
    assert "source" in said
