"""The same small random Llama twice: as transformers saves it, and as an unquantised GGUF file."""

import copy
import string
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ALPHABET = string.ascii_letters + string.digits + " .,:;!?'-"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
SIZES = {"hidden": 64, "inner": 96, "layers": 2, "heads": 4, "kv_heads": 2, "context": 256}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Where both are, and the model itself."""

    folder: Path
    gguf: Path
    model: Any
    tokenizer: Any


def make(folder: Path) -> Tiny:
    """Writes both; skips the test where a package is missing."""
    for package, extra in (("torch", "train"), ("transformers", "train"), ("gguf", "local")):
        pytest.importorskip(package, reason=f"the extra `{extra}` is not installed")
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<end>", "<unknown>", "|"]
    vocabulary = {token: k for k, token in enumerate([*special, *ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>",
        chat_template=TEMPLATE,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=SIZES["hidden"], intermediate_size=SIZES["inner"],
        num_hidden_layers=SIZES["layers"], num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["kv_heads"], max_position_embeddings=SIZES["context"],
        pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    where = folder / "tiny"
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    _write_gguf(model, list(vocabulary), folder / "tiny.gguf")
    return Tiny(folder=where, gguf=folder / "tiny.gguf", model=model, tokenizer=tokenizer)


def make_adapter(tiny: Tiny, folder: Path, *, seed: int = 1, scale: float = 0.3) -> Path:
    """A PEFT adapter of random weights on all linear layers, strong enough to be seen."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 by a name that it has just given up.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
        adapted = get_peft_model(copy.deepcopy(tiny.model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(scale * noise)
    adapted.save_pretrained(str(folder))
    return folder


def _write_gguf(model: Any, tokens: list[str], path: Path) -> None:
    import gguf

    heads = {"q_proj": SIZES["heads"], "k_proj": SIZES["kv_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SIZES["layers"])
    writer.add_context_length(SIZES["context"])
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_feed_forward_length(SIZES["inner"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(SIZES["hidden"] // SIZES["heads"])
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # A space is written as that tokenizer writes it.
    writer.add_token_list([token.replace(" ", "\u0120") for token in tokens])
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["layers"])
    for name, tensor in model.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        if (module := name.split(".")[-2]) in heads:
            O, I = values.shape  # noqa: E741
            halves = values.reshape(heads[module], 2, O // heads[module] // 2, I)
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(O, I))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
