"""Adapters of all policies: made, written and read as PEFT does, with marks of what they fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sia.errors import WeightsError
from sia.weights.gguf_adapter import ADAPTER_FILE, CONFIG_FILE

VALUE_FILE = "value_head.safetensors"
BASE_KEY = "sia.base_sha256"  # among the marks


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An adapter folder, read.

    Attributes:
        marks: What was written beside the tensors, such as `BASE_KEY`.
        settings: `adapter_config.json` as it stands there.
        config: The same as PEFT's LoraConfig, for training.
        further: File -> its tensors, for the files that were asked for besides.
    """

    tensors: dict[str, Tensor]
    marks: Mapping[str, str]
    settings: Mapping[str, Any]
    config: Any
    further: dict[str, dict[str, Tensor]]


def lora_config(
    *, rank: int, alpha: float, dora: bool, targets: str, all_linear: Any = "all-linear", **own: Any
) -> Any:
    """PEFT's description of an adapter.

    Args:
        rank: Of the adapter.
        alpha: It is scaled by alpha / rank.
        dora: DoRA instead of LoRA.
        targets: `all-linear`, or comma-separated names of linear layers.
        all_linear: What the former means for this model.
        own: Further settings of LoraConfig.
    """
    from peft import LoraConfig

    names = [name.strip() for name in targets.split(",")]
    scale: Any = int(alpha) if float(alpha).is_integer() else alpha  # PEFT says int and takes both
    return LoraConfig(
        r=rank,
        lora_alpha=scale,
        use_dora=dora,
        target_modules=all_linear if targets == "all-linear" else names,
        lora_dropout=0.0,
        **own,
    )


def attach(model: nn.Module, config: Any, *, base: str, device: torch.device, seed: int) -> Any:
    """The model with a fresh adapter, which changes nothing yet.

    Raises:
        WeightsError: The model has no such layers.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made: Any = get_peft_model(model, config)
        except ValueError as error:
            raise WeightsError(f"targets do not fit base={base!r}: {error}") from error
    made.to(device)
    made.eval()  # dropout is zero anyway; some models are faster
    return made


def write(
    folder: Path,
    peft: Any,
    *,
    marks: Mapping[str, str],
    value_head: nn.Module | None,
    further: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes the adapter in PEFT's format, and the value head and further files beside it."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    peft.peft_config["default"].save_pretrained(str(folder))
    _save(
        get_peft_model_state_dict(peft, save_embedding_layers=False), folder / ADAPTER_FILE, marks
    )
    for name, tensors in (further or {}).items():
        _save(tensors, folder / name)
    if value_head is not None:
        _save(value_head.state_dict(), folder / VALUE_FILE)


def read(folder: Path, *further: str) -> Stored:
    """Reads what `write` has written.

    Args:
        folder: Of the adapter.
        further: Files that have to be there besides.

    Raises:
        WeightsError: It is no adapter, or it is damaged.
    """
    from peft import LoraConfig

    path = folder / ADAPTER_FILE
    try:
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
        stored = Stored(
            tensors=load_file(path),
            marks=marks,
            # First of all: where the file is missing, PEFT would ask the model hub for it.
            settings=json.loads((folder / CONFIG_FILE).read_text("utf-8")),
            config=LoraConfig.from_pretrained(str(folder)),
            further={name: load_file(folder / name) for name in further},
        )
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise WeightsError(
            f"{folder} holds no adapter that can be read: {error}. An adapter folder has "
            f"{ADAPTER_FILE} and {CONFIG_FILE}."
        ) from error
    stored.config.inference_mode = False
    return stored


def fill(peft: Any, stored: Stored, folder: Path, value_head: nn.Module | None) -> Sequence[str]:
    """Puts stored tensors into a fresh adapter, and into the value head where both have one.

    Returns:
        Names of tensors that there is no layer for.

    Raises:
        WeightsError: They have other shapes.
    """
    from peft import set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(peft, stored.tensors)
    except RuntimeError as error:
        raise WeightsError(f"The adapter in {folder} does not fit its config: {error}") from error
    if not result.unexpected_keys and value_head is not None and (folder / VALUE_FILE).is_file():
        value_head.load_state_dict(load_file(folder / VALUE_FILE))
    unknown: Sequence[str] = result.unexpected_keys
    return unknown


class Head(nn.Linear):
    """A head over labels or values; it expects nothing at first."""

    def reset_parameters(self) -> None:
        """Weight and bias are zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def identity(model: nn.Module, *, precision: torch.dtype = torch.float32) -> str:
    """Digest of names, shapes and leading values of all weights: a moved or renamed base is itself.

    Args:
        model: The base.
        precision: That values are compared in; a base has one identity in all that are finer.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        head = tensor.flatten()[:16].to(precision).float().tolist()
        digest.update(f"{name}{tuple(tensor.shape)}{head}".encode())
    return digest.hexdigest()


def _save(
    tensors: Mapping[str, Tensor], path: Path, marks: Mapping[str, str] | None = None
) -> None:
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(found, path, metadata={"format": "pt", **(marks or {})})
    path.chmod(0o644)  # safetensors makes files that only their owner can read
