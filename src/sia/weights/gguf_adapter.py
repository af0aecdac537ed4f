"""A PEFT adapter as a GGUF file that llama.cpp applies to a base.

Letters: R rank, I inputs and O outputs of a linear layer, H heads. Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sia.errors import WeightsError

Array = NDArray[np.float32]

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# llama.cpp turns positions in pairs of neighbours; for these architectures transformers turns the
# two halves of a head, so the rows of q and k were permuted when the base was converted.
PERMUTED = ("llama",)
PLAIN = ("gemma", "gemma2", "gemma3", "qwen2", "qwen3")

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the conversion needs to know of a base; `shapes` are (inputs, outputs) by name."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    shapes: dict[str, tuple[int, ...]]


def convert(adapter: Path, base: Path, out: Path) -> int:
    """Writes the GGUF adapter of a PEFT adapter; gives how many linear layers it changes.

    Args:
        adapter: A folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The GGUF file that the adapter is for.
        out: The file to be written.

    Raises:
        WeightsError: The adapter cannot be read, is of a kind that llama.cpp does not know, or
            does not fit the base.
    """
    import gguf

    config, tensors = _read_adapter(adapter)
    facts = read_base(base)
    names = gguf.get_tensor_name_map(_architecture(facts.architecture), facts.layers)
    modules = sorted(name[:-2] for name in tensors if name.endswith(".A"))
    writer = gguf.GGUFWriter(out, facts.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # no scale: it is in B already
    for module in modules:
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        a_RI, b_OR = (
            tensors[f"{module}.A"],
            tensors[f"{module}.B"] * _scale(config, module, tensors),
        )
        if name is None or name not in facts.shapes:
            raise WeightsError(
                f"The adapter in {adapter} changes {module!r}, which {base.name} does not have."
            )
        if facts.shapes[name] != (a_RI.shape[1], b_OR.shape[0]):
            raise WeightsError(
                f"The adapter in {adapter} was made for another base: {module!r} is "
                f"{b_OR.shape[0]}x{a_RI.shape[1]} there and "
                f"{'x'.join(map(str, reversed(facts.shapes[name])))} in {base.name}."
            )
        if facts.architecture in PERMUTED and module.endswith((".q_proj", ".k_proj")):
            heads = facts.heads if module.endswith(".q_proj") else facts.kv_heads
            b_OR = interleaved(b_OR, heads)
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a_RI))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b_OR))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(modules)


def interleaved(rows_OR: Array, heads: int) -> Array:
    """The two halves of each head's rows, row by row in turn."""
    O, R = rows_OR.shape  # noqa: E741
    return rows_OR.reshape(heads, 2, O // heads // 2, R).swapaxes(1, 2).reshape(O, R)


def read_base(path: Path) -> Base:
    """What a GGUF file says of its model.

    Raises:
        WeightsError: It is none, or of an architecture that adapters are not converted for.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = reader.fields
        architecture = str(fields["general.architecture"].contents())
        layers, heads, kv_heads = (
            int(fields[f"{architecture}.{key}"].contents())
            for key in ("block_count", "attention.head_count", "attention.head_count_kv")
        )
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is no GGUF file of a language model: {error}") from error
    if architecture not in (*PERMUTED, *PLAIN):
        raise WeightsError(
            f"{path.name} is of the architecture {architecture!r}; adapters are converted for "
            f"{', '.join((*PERMUTED, *PLAIN))}. Serve the base from its transformers folder "
            "instead: no conversion is needed there."
        )
    return Base(
        architecture=architecture,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        shapes={t.name: tuple(int(size) for size in t.shape) for t in reader.tensors},
    )


def _architecture(name: str) -> Any:
    import gguf

    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Configuration, and `module.A` or `module.B` -> matrix in float32."""
    import safetensors

    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        stored = cast(Any, safetensors).deserialize((folder / ADAPTER_FILE).read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{folder} holds no adapter that can be read: {error}. An adapter folder has "
            f"{ADAPTER_FILE} and {CONFIG_FILE}."
        ) from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("lora_bias"):
        raise WeightsError(
            f"The adapter in {folder} is not plain LoRA, and llama.cpp applies nothing else. Serve "
            "the base from its transformers folder instead."
        )
    tensors = {}
    for name, tensor in stored:
        found = _NAME.fullmatch(name)
        if found is None:
            raise WeightsError(
                f"The adapter in {folder} holds {name!r}, which is no LoRA matrix of a linear "
                "layer. Serve the base from its transformers folder instead."
            )
        tensors[f"{found['module']}.{found['side']}"] = _float32(tensor)
    return config, tensors


def _float32(tensor: dict[str, Any]) -> Array:
    kind, data = tensor["dtype"], tensor["data"]
    if kind == "BF16":  # numpy lacks it: the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)
    return values.reshape(tensor["shape"]).astype(np.float32)


def _scale(config: dict[str, Any], module: str, tensors: dict[str, Array]) -> float:
    """What PEFT multiplies B·A with."""
    alphas = config.get("alpha_pattern") or {}
    own = next((a for key, a in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    alpha = float(config["lora_alpha"] if own is None else own)
    rank = tensors[f"{module}.A"].shape[0]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
