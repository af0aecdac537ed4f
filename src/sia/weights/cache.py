"""What a model remembers of what it has read, so that a group of answers costs one prompt.

Letters: B answers, A those still being written, N prompts, G answers a prompt, P prompt tokens,
T answer tokens so far, L places for them, H heads of keys, Q queries a head of keys, D width of a
head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ROOM = 64  # tokens
NAME = "sia_grouped"  # of the attention, for transformers
_STRANGE = ("position_bias", "softcap", "s_aux", "sliding_window")
_cache: ContextVar[DynamicCache | None] = ContextVar("cache", default=None)


def shared_cache(config: Any) -> DynamicCache | None:
    """An empty cache that hands a prompt on to several answers, with its gradient.

    None where the model does not keep all it has read: sliding windows and recurrent layers.
    """
    cache = DynamicCache(config=config)
    if cache.layers and all(type(one) is DynamicLayer for one in cache.layers):
        return cache
    return None


@contextlib.contextmanager
def sampling_cache(model: Any, prompt_mask_NP: Tensor) -> Iterator[DynamicCache]:
    """An empty cache for sampling, while the model attends as it needs.

    First the model reads the prompts, then `batch_repeat_interleave` makes groups of them. Layers
    that keep all they have read, with an ordinary attention, keep each prompt once.
    """
    cache: Any = DynamicCache(config=model.config)
    cache.layers = [
        GroupLayer(prompt_mask_NP) if type(one) is DynamicLayer else one for one in cache.layers
    ]
    before, mark = model.config._attn_implementation, _cache.set(cache)
    try:
        if before == "sdpa":
            model.config._attn_implementation = NAME
        yield cache
    finally:
        model.config._attn_implementation = before
        _cache.reset(mark)


def grouped(cache: DynamicCache) -> bool:
    """Whether every layer keeps each prompt once, and so needs no mask of the prompts."""
    return all(isinstance(one, GroupLayer) and one.split for one in cache.layers)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the next token of every answer goes, held on the device.

    Attributes:
        at_1: Its index.
        ahead_L: The places behind it, which hold nothing yet.
    """

    at_1: Tensor
    ahead_L: Tensor

    @classmethod
    def of(cls, size: int, device: torch.device) -> Place:
        """At the first of `size` places, once `move` has been called."""
        at_1 = torch.zeros(1, dtype=torch.long, device=device)
        return cls(at_1=at_1, ahead_L=torch.ones(size, dtype=torch.bool, device=device))

    def move(self, at: int) -> None:
        """To an index that is not before the present one."""
        self.at_1.fill_(at)
        self.ahead_L[: at + 1] = False


class GroupLayer(DynamicLayer):
    """Keys and values of answers, (A, H, T, D), and of their prompts apart from them, (N, H, P, D).

    Where the attention cannot take them apart, the prompts are repeated and stand before the
    answers. Tokens are appended in memory that is longer than they, see `ROOM`.
    """

    def __init__(self, prompt_mask_NP: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        hidden_NP = prompt_mask_NP == 0
        self._hidden_N11P = hidden_NP[:, None, None] if bool(hidden_NP.any()) else None
        self._prompts = len(prompt_mask_NP)
        self._own: tuple[_Room, _Room] | None = None
        self._prompt: tuple[Tensor, Tensor] | None = None
        self._rows_A: Tensor | None = None  # of those still being written; None: all
        self._place: Place | None = None
        self.attends = False  # whether it is this layer's attention that reads it, and knows how
        self.size = 1  # of a group

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values of new tokens, and gives those of all tokens but the prompts."""
        if self._own is None:
            return super().update(key_states, value_states)
        if self._place is not None:
            assert self.keys is not None
            assert self.values is not None
            self.keys.index_copy_(2, self._place.at_1, key_states)
            self.values.index_copy_(2, self._place.at_1, value_states)
            return self.keys, self.values
        keys, values = self._own
        self.keys = keys.appended(self.keys, key_states)
        self.values = values.appended(self.values, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of prompt and answer."""
        prompt = 0 if self._prompt is None else self._prompt[0].shape[2]
        return prompt + super().get_seq_length()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes groups."""
        self._own = _Room(), _Room()
        assert self.keys is not None
        assert self.values is not None
        # One answer to a prompt gains nothing, but that its passes can be recorded on a GPU.
        if not self.attends or (repeats == 1 and self.keys.device.type == "cpu"):
            super().batch_repeat_interleave(repeats)
            return
        self.size, self._prompt = repeats, (self.keys, self.values)
        N, H, _, D = self.keys.shape
        self.keys = self.keys.new_empty(N * repeats, H, 0, D)
        self.values = self.values.new_empty(N * repeats, H, 0, self.values.shape[-1])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Goes on with some of the answers."""
        assert self.keys is not None
        assert self.values is not None
        if self._prompt is not None:
            every_B = torch.arange(len(self.keys), device=indices.device)
            self._rows_A = (every_B if self._rows_A is None else self._rows_A)[indices]
        self.keys, self.values = self.keys[indices], self.values[indices]

    def fix(self, place: Place, used: int) -> None:
        """From now on tokens go where `place` says, into memory that stays where it is."""
        assert self.keys is not None
        assert self.values is not None
        A, H, _, D = self.keys.shape
        size = len(place.ahead_L)
        # Zeros: what has no weight is added all the same.
        keys = self.keys.new_zeros(A, H, size, D)
        values = self.values.new_zeros(A, H, size, self.values.shape[-1])
        keys[:, :, :used] = self.keys[:, :, :used]
        values[:, :, :used] = self.values[:, :, :used]
        self.keys, self.values, self._place = keys, values, place

    def free(self, used: int) -> None:
        """Undoes `fix`."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, :used], self.values[:, :, :used]
        self._place = None

    @property
    def split(self) -> bool:
        """Whether the prompts are kept apart."""
        return self._prompt is not None

    def attention(self, query_AHQD: Tensor) -> Tensor:
        """What one new token of each answer reads, (A, H, Q, D); the query is scaled already."""
        assert self._prompt is not None
        assert self.keys is not None
        assert self.values is not None
        keys_NHPD, values_NHPD = self._prompt
        P = keys_NHPD.shape[2]
        scores_NHXP = self._grouped(query_AHQD) @ keys_NHPD.transpose(-1, -2)
        if self._hidden_N11P is not None:
            scores_NHXP.masked_fill_(self._hidden_N11P, -torch.inf)
        scores_AHQT = query_AHQD @ self.keys.transpose(-1, -2)
        if self._place is not None:
            scores_AHQT.masked_fill_(self._place.ahead_L, -torch.inf)
        scores_NHXT = self._grouped(scores_AHQT)
        weights_NHXL = torch.cat([scores_NHXP, scores_NHXT], -1).softmax(-1)
        read_AHQD = self._apart(weights_NHXL[..., :P] @ values_NHPD, query_AHQD.shape[2])
        weights_AHQT = self._apart(weights_NHXL[..., P:], query_AHQD.shape[2])
        return read_AHQD + weights_AHQT @ self.values

    def _grouped(self, some_AHQY: Tensor) -> Tensor:
        """Answers of a prompt side by side, (N, H, X = G Q, Y), zeros for those that have ended."""
        _, H, Q, Y = some_AHQY.shape
        if self._rows_A is not None:
            every_BHQY = some_AHQY.new_zeros(self._prompts * self.size, H, Q, Y)
            some_AHQY = every_BHQY.index_copy_(0, self._rows_A, some_AHQY)
        return (
            some_AHQY.view(-1, self.size, H, Q, Y).transpose(1, 2).reshape(-1, H, self.size * Q, Y)
        )

    def _apart(self, some_NHXY: Tensor, Q: int) -> Tensor:
        """Undoes `_grouped`, (A, H, Q, Y)."""
        N, H, _, Y = some_NHXY.shape
        every_BHQY = some_NHXY.view(N, H, self.size, Q, Y).transpose(1, 2).reshape(-1, H, Q, Y)
        return every_BHQY if self._rows_A is None else every_BHQY.index_select(0, self._rows_A)


class _Room:
    """Memory whose beginning is in use."""

    def __init__(self) -> None:
        self._memory = self._used = torch.empty(0, 0, 0, 0)

    def appended(self, old_AHTD: Tensor | None, new_AHTD: Tensor) -> Tensor:
        """`old` and `new` one behind the other; `old` is copied only where it has no room."""
        assert old_AHTD is not None
        A, H, T, D = old_AHTD.shape
        end = T + new_AHTD.shape[2]
        if old_AHTD is not self._used or end > self._memory.shape[2]:
            self._memory = old_AHTD.new_empty(A, H, end + ROOM, D)
            self._memory[:, :, :T] = old_AHTD
        self._memory[:, :, T:end] = new_AHTD
        self._used = self._memory[:, :, :end]
        return self._used


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention of a layer, as transformers calls it; all but one new token is left to SDPA."""
    cache: Any = _cache.get()
    layer = cache.layers[getattr(module, "layer_idx")] if cache is not None else None  # noqa: B009
    if isinstance(layer, GroupLayer):
        if layer.split:
            A, heads, _, D = query.shape
            H = key.shape[1]
            scale = D**-0.5 if scaling is None else scaling
            # One query a head: a head of keys has the queries of its group of heads.
            read = layer.attention(query.view(A, H, heads // H, D) * scale)
            return read.view(A, 1, heads, -1), None
        layer.attends = (
            key is layer.keys
            and value is layer.values
            and (attention_mask is None or attention_mask.dtype == torch.bool)
            and all(kwargs.get(name) is None for name in _STRANGE)
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
