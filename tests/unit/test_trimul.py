"""The task `trimul` without PyTorch: splits, inputs, judging, what a verifier makes of times."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sia.errors import TaskError
from sia.tasks import load_task
from sia.tasks.data import task_module

TASK = load_task(Path(__file__).resolve().parents[2] / "tasks" / "trimul")
CASE = {"batch": 2, "n": 8, "dim": 16, "mask": "random", "values": "cauchy"}


@pytest.fixture(scope="module")
def verifier() -> ModuleType:
    return task_module(TASK, "verify")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trimul")
    task_module(TASK, "prepare").prepare(root, root / "public", root / "private", seed=5)
    return root


def timed(verifier: ModuleType, n: int, eager: list[float], own: list[float], **more: Any) -> Any:
    case = CASE | {"n": n}
    return verifier.arena.Timed(
        case=case, answered=True, eager_s=eager, own_s=own, eager_cpu_s=eager, own_cpu_s=own,
        null_s=[0.0], **more,
    )  # fmt: skip


# --- splits


def shapes(cases: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(sorted(case.items())) for case in cases}


def test_no_case_of_a_split_is_in_another_one_or_public(sides: Path) -> None:
    public = json.loads((sides / "public" / "cases.json").read_text())
    dev, test = (
        json.loads((sides / "private" / split / "cases.json").read_text())
        for split in ("dev", "test")
    )
    assert len(dev["cases"]) == len(test["cases"]) == TASK.facts.splits["dev"] == 8
    assert not shapes(dev["cases"]) & shapes(test["cases"])
    assert not shapes(public["cpu"]) & shapes(dev["cases"] + test["cases"])
    assert dev["seed"] != test["seed"]
    assert len(public["gpu"]) == 7


def test_dev_asks_for_more_than_the_exam(sides: Path) -> None:
    dev, test = (
        json.loads((sides / "private" / split / "cases.json").read_text())["tolerance_share"]
        for split in ("dev", "test")
    )
    assert dev < test == 1


def test_revealed_dev_cases_are_among_the_examples(sides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    task_module(TASK, "prepare").reveal_dev(sides / "public", sides / "private" / "dev", out)
    assert len(json.loads((out / "cases.json").read_text())["cpu"]) == 16
    assert (out / "reference.py").read_bytes() == (sides / "public" / "reference.py").read_bytes()


# --- inputs


def test_inputs_lie_in_one_block_without_overlap(verifier: ModuleType) -> None:
    inputs = verifier.inputs
    block = bytearray(inputs.n_bytes(CASE))
    arrays = inputs.views(CASE, block)
    for number, array in enumerate(arrays.values(), start=1):
        array[...] = number
    for number, array in enumerate(arrays.values(), start=1):
        assert (array == number).all()
    assert arrays["x"].shape == (2, 8, 8, 16)
    assert arrays["to_out.weight"].shape == (16, 128)


def test_inputs_have_the_distributions_that_are_documented(verifier: ModuleType) -> None:
    inputs = verifier.inputs
    case = {"batch": 1, "n": 64, "dim": 128, "mask": "random", "values": "cauchy"}
    arrays = inputs.views(case, bytearray(inputs.n_bytes(case)))
    inputs.fill(case, arrays, np.random.default_rng(0))
    assert all(np.isfinite(array).all() for array in arrays.values())
    # Half of a Cauchy(0, s) lies within s of 0.
    assert np.mean(np.abs(arrays["x"]) < 2) == pytest.approx(0.5, abs=0.01)
    assert set(np.unique(arrays["mask"])) == {0.0, 1.0}
    assert arrays["mask"].mean() == pytest.approx(0.5, abs=0.05)
    assert arrays["left_proj.weight"].std() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    assert arrays["to_out.weight"].std() == pytest.approx(1 / math.sqrt(128), rel=0.05)
    plain = case | {"mask": "none", "values": "normal"}
    inputs.fill(plain, arrays, np.random.default_rng(0))
    assert arrays["x"].std() == pytest.approx(1, rel=0.01)
    assert (arrays["mask"] == 1).all()


# --- judging


def test_an_error_is_measured_in_tolerances(verifier: ModuleType) -> None:
    error = verifier.arena.error
    expected = np.array([[0.0, 1.0, -10.0]], np.float32)
    assert error(expected, expected) == 0
    assert error(expected + np.float32(0.01), expected) == pytest.approx(0.5, rel=1e-4)
    assert error(expected * np.float32(1.022), expected) == pytest.approx(1, rel=1e-2)
    assert error(np.full_like(expected, np.nan), expected) == math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing or is not a plain file"),
        ("def custom_kernel(data:\n", "is not Python"),
        ("x = 1\n" + "#" * 2**20, "more than 1048576 bytes"),
        ("x = 1\0\n", "is not Python"),
    ],
)
def test_a_submission_that_cannot_be_read_is_refused_before_it_runs(
    verifier: ModuleType, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "submission.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        verifier.read_submission(tmp_path)


def test_a_link_is_no_submission(verifier: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("x = 1\n")
    (tmp_path / "submission.py").symlink_to(tmp_path / "other.py")
    with pytest.raises(ValueError, match="not a plain file"):
        verifier.read_submission(tmp_path)


# --- what a verifier makes of times


def test_the_score_is_the_geometric_mean_and_the_mean_of_the_items(verifier: ModuleType) -> None:
    cases = [timed(verifier, 8, [4.0, 5.0], [1.0, 9.0]), timed(verifier, 16, [3.0], [3.0])]
    found = verifier.result(cases, [], {"triton": False}, ([], ""))
    assert found["score"] == pytest.approx(2)
    assert np.mean(list(found["items"].values())) == pytest.approx(found["score"])
    assert (found["n_items"], found["n_answered"]) == (2, 2)
    assert found["symptoms"]["large_gap"] == pytest.approx(math.log(4))
    assert found["metrics"]["noise"] > 0


def test_what_measuring_costs_is_taken_off_both_but_never_more_than_half(
    verifier: ModuleType,
) -> None:
    case = timed(verifier, 8, [11.0], [3.0])
    case.null_s = [1.0, 2.0]
    assert verifier.speed_up(case) == pytest.approx(10 / 2)
    case.null_s = [2.5]
    assert verifier.speed_up(case) == pytest.approx(8.5 / 1.5)


def test_one_wrong_case_makes_the_score_zero_and_says_which(verifier: ModuleType) -> None:
    cases = [
        timed(verifier, 8, [4.0], [1.0]),
        timed(verifier, 16, [4.0], [1.0], problem="3 of 9 values are wrong"),
    ]
    found = verifier.result(cases, [], {"triton": False}, ([], ""))
    assert found["score"] == 0
    assert set(found["items"].values()) == {0.0}
    assert found["metrics"]["correct_share"] == 0.5
    assert found["breakdown"]["wrong"] == {"16x2x16-cauchy-masked": "3 of 9 values are wrong"}


def test_a_wrong_triton_kernel_makes_the_score_zero(verifier: ModuleType) -> None:
    triton = [timed(verifier, 8, [], [], problem="TypeError: no"), timed(verifier, 16, [], [])]
    facts = {"triton": True, "built": {"kernels": 3, "sm_90": 3, "note": "said by the guest"}}
    found = verifier.result([timed(verifier, 8, [4.0], [1.0])], triton, facts, ([], ""))
    assert found["score"] == 0
    assert found["metrics"]["triton_correct"] == 0.5
    assert found["metrics"]["triton_sm_90"] == 3
    assert "triton_note" not in found["metrics"]


def test_gpu_times_stand_beside_the_score_with_the_name_of_the_card(verifier: ModuleType) -> None:
    gpu = timed(verifier, 256, [2e-3], [1.2e-3])
    gpu.null_s = [2e-4]
    found = verifier.result(
        [timed(verifier, 8, [4.0], [1.0])], [], {"triton": False}, ([gpu], "NVIDIA H100")
    )
    assert found["score"] == pytest.approx(4)
    assert found["metrics"]["us_geomean"] == pytest.approx(1000)
    assert list(found["breakdown"]["gpu"]) == ["NVIDIA H100"]


def test_a_call_that_noise_makes_cheaper_than_nothing_is_not_free(verifier: ModuleType) -> None:
    gpu = timed(verifier, 256, [2e-3], [1e-3])
    gpu.null_s = [3e-3]
    found = verifier.result(
        [timed(verifier, 8, [4.0], [1.0])], [], {"triton": False}, ([gpu], "NVIDIA H100")
    )
    assert found["metrics"]["us_geomean"] == pytest.approx(500)  # half of the call at most


def test_a_package_that_a_task_needs_is_named_with_its_extra(toy: Any) -> None:
    path = toy.root / "task.yaml"
    path.write_text(path.read_text() + "needs: {no_such_package: train}\n")
    with pytest.raises(TaskError, match=r"needs the package 'no_such_package'.*'\.\[train\]'"):
        load_task(toy.root).check_needs()
