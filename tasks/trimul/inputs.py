"""Inputs of one call: their shapes, how they are drawn, and how they lie in one block of memory.

NumPy alone, so that whoever draws them needs no PyTorch.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN = 128
PROJECTIONS = ("left_proj", "right_proj", "left_gate", "right_gate", "out_gate")
ALIGN = 64  # bytes; where an array begins

Case = Mapping[str, Any]  # batch, n, dim, mask (none | random), values (normal | cauchy)
Array = NDArray[np.float32]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Every array of a call by name, in the order in which they lie in memory."""
    batch, n, dim = case["batch"], case["n"], case["dim"]
    return {
        "x": (batch, n, n, dim),
        "mask": (batch, n, n),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        **{f"{name}.weight": (HIDDEN, dim) for name in PROJECTIONS},
        "to_out_norm.weight": (HIDDEN,),
        "to_out_norm.bias": (HIDDEN,),
        "to_out.weight": (dim, HIDDEN),
    }


def n_bytes(case: Case) -> int:
    """Size of the block that holds all arrays of a call."""
    return sum(_padded(shape) for shape in shapes(case).values())


def views(case: Case, block: Any) -> dict[str, Array]:
    """The arrays of a call as views of a writable block of `n_bytes(case)` bytes."""
    found, offset = {}, 0
    for name, shape in shapes(case).items():
        flat = np.frombuffer(block, np.float32, count=math.prod(shape), offset=offset)
        found[name] = flat.reshape(shape)
        offset += _padded(shape)
    return found


def fill(case: Case, arrays: Mapping[str, Array], rng: np.random.Generator) -> None:
    """Draws new inputs into `arrays`, in the distributions of the public problem.

    Values are normal(0, 1) or Cauchy(0, 2); a random mask is zero in half of its places. Weights
    are normal, those of linear maps divided by the square root of the width that they lead to.
    """
    _normal(arrays["x"], rng)
    if case["values"] == "cauchy":
        # The quotient of two normals: three times as fast as NumPy's own Cauchy.
        for row in arrays["x"].reshape(-1, case["dim"] * case["n"]):
            below = rng.standard_normal(row.shape, np.float32)
            below[below == 0] = 1
            row *= 2 / below
    arrays["mask"][...] = 1
    if case["mask"] == "random":
        arrays["mask"][...] = rng.integers(0, 2, arrays["mask"].shape)
    for name, array in arrays.items():
        if name not in ("x", "mask"):
            _normal(array, rng)
    for name in PROJECTIONS:
        arrays[f"{name}.weight"][...] /= math.sqrt(HIDDEN)
    arrays["to_out.weight"][...] /= math.sqrt(case["dim"])


def digest_weights(shape: tuple[int, ...], seed: int) -> tuple[Array, Array, Array]:
    """Weights of the first two axes together, of the third and of the fourth."""
    rng = np.random.default_rng(seed)
    batch, n, _, dim = shape
    sizes = ((batch, n), (n,), (dim,))
    rows, columns, channels = (rng.random(size, np.float32) for size in sizes)
    return rows, columns, channels


def _normal(array: Array, rng: np.random.Generator) -> None:
    rng.standard_normal(dtype=np.float32, out=array)


def _padded(shape: tuple[int, ...]) -> int:
    return -(-4 * math.prod(shape) // ALIGN) * ALIGN
