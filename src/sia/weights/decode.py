"""Reading answers token by token: on a GPU a pass is recorded once and then only repeated.

A pass of a small batch through a language model is a thousand short kernels, and starting them one
by one takes far longer than they do. Letters: A answers that are being written, V vocabulary, L
places in the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sia.weights.cache import Place

ROOM = 128  # tokens that a recording is good for
FEW = 8  # tokens for which none is made

Pass = Callable[[], Tensor]
Capture = Callable[[Pass], Pass]


class Decoder:
    """Reads the next token of each answer, and gives the logits of the one after it, (A, V).

    Args:
        read: Token ids and positions, (A, 1) each -> logits; appends to the cache.
        cache: Of the prompts, in groups.
        limit: Tokens of the longest answer.
        capture: Records a pass of a cache that keeps each prompt once; None: every pass is made
            anew.
    """

    def __init__(
        self,
        *,
        read: Callable[[Tensor, Tensor], Tensor],
        cache: Any,
        limit: int,
        capture: Capture | None,
    ) -> None:
        self._read, self._cache, self._limit, self._capture = read, cache, limit, capture
        self._used = 0  # tokens of the answers in the cache
        self._place: Place | None = None
        self._pass: Pass | None = None

    def __call__(self, ids_A1: Tensor, positions_A1: Tensor) -> Tensor:
        """The logits are overwritten by the next call."""
        if self._pass is None or self._place is None or self._used == len(self._place.ahead_L):
            # The first pass is made in any case: libraries set themselves up in it.
            if self._capture is None or self._used == 0 or self._limit - self._used < FEW:
                return self._anew(ids_A1, positions_A1)
            try:
                self._pass = self._recorded(ids_A1, positions_A1, self._capture)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(
                    "This model cannot be recorded as a CUDA graph, which makes its answers slow: "
                    f"{str(error).splitlines()[0]}",
                    stacklevel=2,
                )
                self._capture = None
                return self._anew(ids_A1, positions_A1)
        assert self._place is not None
        self._ids_A1.copy_(ids_A1)
        self._positions_A1.copy_(positions_A1)
        self._place.move(self._used)
        self._used += 1
        return self._pass()

    def select(self, indices: Tensor) -> None:
        """Goes on with some of the answers."""
        self._cache.batch_select_indices(indices)
        self._pass = None  # the tensors that it knows are gone

    def _recorded(self, ids_A1: Tensor, positions_A1: Tensor, capture: Capture) -> Pass:
        self._pass = None
        if self._place is None or self._used == len(self._place.ahead_L):
            size = min(self._used + ROOM, self._limit)
            self._place = Place.of(size, ids_A1.device)
            for layer in self._cache.layers:
                layer.fix(self._place, self._used)
        self._place.move(self._used)
        self._ids_A1, self._positions_A1 = ids_A1.clone(), positions_A1.clone()
        return capture(lambda: self._read(self._ids_A1, self._positions_A1))

    def _anew(self, ids_A1: Tensor, positions_A1: Tensor) -> Tensor:
        if self._place is not None:
            for layer in self._cache.layers:
                layer.free(self._used)
            self._place = self._pass = None
        self._used += 1
        return self._read(ids_A1, positions_A1)


def cuda_graph(run: Pass) -> Pass:
    """Records what `run` starts on the GPU, without doing it, and gives what repeats it."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            found = run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def repeat() -> Tensor:
        graph.replay()
        return found

    return repeat
