"""A base small enough to train anywhere: random weights, one token a character.

For tests, benchmarks and dry runs: `python -m sia.weights.tiny my_base`, then
`"policy": {"kind": "causal_lm", "base": "my_base"}`. It knows nothing until it is taught.
"""

import string
import sys
from pathlib import Path
from typing import Any, cast

ALPHABET = string.digits + string.ascii_lowercase + " +-*=?.,:"


def make_base(
    folder: Path,
    *,
    alphabet: str = ALPHABET,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    seed: int = 0,
) -> int:
    """Writes a Llama of random weights and its tokenizer; gives the number of its parameters."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<unknown>"]
    vocabulary = {token: k for k, token in enumerate([*special, *alphabet])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        # The head stays frozen under an adapter: with the usual 0.02 it could never be sure.
        initializer_range=width**-0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    print(f"{make_base(Path(sys.argv[1])):,} parameters in {sys.argv[1]}")
