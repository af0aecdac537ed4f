"""What to do when memory runs out: the same computation in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from sia.errors import WeightsError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Halved(Generic[T]):
    """What a computation gave, and the size of the parts that fitted into memory."""

    value: T
    size: int


def halving(run: Callable[[int], T], size: int, *, unit: int = 1) -> Halved[T]:
    """`run(size)`, with `size` halved as often as memory runs out.

    Args:
        run: Starts from scratch whenever it is called; takes the size of its parts.
        size: To begin with.
        unit: Sizes are multiples of it, and none is smaller.

    Raises:
        WeightsError: Not even parts of `unit` fit.
    """
    while True:
        try:
            return Halved(value=run(size), size=size)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if size <= unit:
                raise WeightsError(
                    f"Memory does not hold {size} answer(s) at once: {str(error).splitlines()[0]} "
                    "Shorten answers (policy.max_answer_tokens), lower recipe.rank, or set "
                    "policy.checkpoint_activations=true."
                ) from error
        # After the handler, so that the failed attempt's tensors are gone; those of something that
        # was done before may hang together in a circle.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = max(unit, size // 2 // unit * unit)


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)  # how PyTorch says it on a CPU
    )
