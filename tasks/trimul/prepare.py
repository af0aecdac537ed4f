"""Makes the cases of `trimul` from the seed: shapes by family, a secret for each split."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PUBLIC = ("task.md", "inputs.py", "reference.py")
ROUNDS = 9
BUDGET_S = 45  # no further round begins after it
GPU_ROUNDS = 5
# Of the tolerance: a submission near its limit is right on some draws and wrong on others. What dev
# lets pass shall not fail in the exam.
TOLERANCE_SHARE = {"dev": 0.8, "test": 1.0}

# The families: batch, width, mask, values, and the range of N; each split draws its own N.
FAMILIES = (
    (2, 128, "none", "normal", (64, 96)),
    (1, 128, "none", "cauchy", (96, 128)),
    (1, 128, "random", "normal", (128, 160)),
    (1, 128, "none", "normal", (160, 208)),
    (2, 256, "none", "normal", (64, 88)),
    (1, 256, "random", "cauchy", (80, 112)),
    (1, 384, "random", "normal", (88, 120)),
    (1, 384, "none", "normal", (64, 96)),
)
STEP = 8  # N is a multiple of it
# Of the public problem, by N, batch, C: those of its correctness cases that the interpreter
# can do, and the seven that are ranked.
TRITON = ((32, 1, 128), (64, 2, 256), (128, 1, 768))
DEV_TRITON = 2  # the third takes half a minute
RANKED = (
    (256, 2, 128, "none", "normal"),
    (768, 1, 128, "none", "cauchy"),
    (256, 2, 384, "random", "normal"),
    (512, 1, 128, "none", "normal"),
    (1024, 1, 128, "none", "cauchy"),
    (768, 1, 384, "random", "normal"),
    (1024, 1, 384, "none", "normal"),
)


def prepare(raw: Path, public: Path, private: Path, *, seed: int) -> None:
    """Writes the public and the private side; `raw` is not used.

    No split has a shape of another one, and the public examples are a third draw.
    """
    rng = random.Random(seed)
    draws: dict[str, list[dict[str, Any]]] = {"public": [], "dev": [], "test": []}
    for batch, dim, mask, values, (low, high) in FAMILIES:
        sizes = rng.sample(range(low, high + 1, STEP), len(draws))
        for cases, n in zip(draws.values(), sizes, strict=True):
            cases.append({"batch": batch, "n": n, "dim": dim, "mask": mask, "values": values})
    public.mkdir(parents=True)
    for name in PUBLIC:
        shutil.copyfile(HERE / name, public / name)
    _write(
        public / "cases.json", {"cpu": draws["public"], "triton": _triton(TRITON), "gpu": ranked()}
    )
    for split in ("dev", "test"):
        plan = {
            "seed": rng.getrandbits(64),
            "rounds": ROUNDS,
            "budget_s": BUDGET_S,
            "tolerance_share": TOLERANCE_SHARE[split],
            "cases": draws[split],
            "triton": _triton(TRITON[:DEV_TRITON] if split == "dev" else TRITON),
            "gpu": ranked(),
            "gpu_rounds": GPU_ROUNDS,
        }
        _write(private / split / "cases.json", plan)


def reveal_dev(public: Path, private_dev: Path, out: Path) -> None:
    """Copies the public side to `out`, with the dev cases among the examples."""
    shutil.copytree(public, out)
    cases = json.loads((public / "cases.json").read_text(encoding="utf-8"))
    dev = json.loads((private_dev / "cases.json").read_text(encoding="utf-8"))
    _write(out / "cases.json", {**cases, "cpu": cases["cpu"] + dev["cases"]})


def _triton(shapes: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    return [
        {"batch": batch, "n": n, "dim": dim, "mask": mask, "values": values}
        for values, mask in (("normal", "none"), ("cauchy", "random"))
        for n, batch, dim in shapes
    ]


def ranked() -> list[dict[str, Any]]:
    """The seven cases that are ranked on a GPU."""
    return [
        {"batch": batch, "n": n, "dim": dim, "mask": mask, "values": values}
        for n, batch, dim, mask, values in RANKED
    ]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
