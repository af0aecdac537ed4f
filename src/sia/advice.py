"""What was wrong with a command line: every fault, with the nearest right name."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sia.config import register

HIDDEN_GROUPS = ("hydra", "schema")
# Flags of Hydra whose value is a word of its own; it is no override.
FLAGS_WITH_VALUE = (
    "-c", "--cfg", "-p", "--package", "-cn", "--config-name", "-cp", "--config-path",
)  # fmt: skip
HELP = "Groups and options: python -m sia --help"


def explain(argv: Sequence[str], error: Exception) -> str:
    """A message for a configuration that could not be composed.

    Args:
        argv: The command line without the program.
        error: What Hydra or OmegaConf raised.
    """
    texts, folder = split_arguments(argv)
    if folder is not None and not Path(folder).is_dir():
        return f"-cd {folder}: there is no such folder, from here ({Path.cwd()})."
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("sia.conf", version_base="1.3"):
        found = list(_faults(texts, folder))
    if found:
        return "\n".join(found)
    return _missing(error) or f"{_first_line(error)} {HELP}"


def split_arguments(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The overrides of a command line, and the folder named by `-cd`."""
    overrides: list[str] = []
    folder: str | None = None
    words = iter(argv)
    for word in words:
        if word in ("-cd", "--config-dir"):
            folder = next(words, None)
        elif word in FLAGS_WITH_VALUE:
            next(words, None)
        elif word.startswith("--config-dir="):
            folder = word.partition("=")[2]
        elif not word.startswith("-"):
            overrides.append(word)
    return overrides, folder


def options(folder: str | None = None) -> dict[str, list[str]]:
    """All groups with their options, those of a user's own folder included. Needs Hydra set up."""
    loader = GlobalHydra.instance().config_loader()
    found = {
        group: loader.get_group_options(group)
        for group in loader.list_groups("")
        if group not in HIDDEN_GROUPS
    }
    for file in sorted(Path(folder).glob("*/*.yaml")) if folder else ():
        found.setdefault(file.parent.name, []).append(file.stem)
    return found


def _faults(texts: Sequence[str], folder: str | None) -> Iterator[str]:
    parser = OverridesParser.create()
    overrides: list[Override] = []
    for text in texts:
        try:
            overrides.append(parser.parse_override(text))
        except HydraException as error:
            yield f"{text!r} is not key=value: {_first_line(error)}"
    groups = options(folder)
    chosen = [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []
    for override in overrides:
        name = override.key_or_group
        if name in groups and not isinstance(override.value(), dict):
            if override.value() is None and not override.is_delete():
                yield f"{override.input_line}: to choose nothing of {name}, leave it out."
                continue
            for option in _options_of(override):
                if option is not None and option not in groups[name]:
                    yield (
                        f"{name}={option!r} is not an option of {name}."
                        f"{nearest(option, groups[name])} Options: {', '.join(groups[name])}."
                    )
                    break
            else:
                if not override.is_sweep_override():
                    chosen.append(str(override.input_line))
    try:
        whole = compose("config", overrides=chosen)
        known = set(_keys(OmegaConf.to_container(whole, resolve=False)))
    except (HydraException, OmegaConfBaseException) as error:
        yield _first_line(error)
        return
    for override in overrides:
        name = override.key_or_group
        if (
            name in groups
            or override.is_add()
            or override.is_force_add()
            or name.startswith("hydra")
        ):
            continue
        if name not in known:
            if _is_open(whole, name):
                yield f"{name} is not there yet. To add it: '+{override.input_line}'"
                continue
            yield f"There is no key {name!r}.{nearest(name, known | groups.keys())} {HELP}"
            continue
        if override.is_sweep_override():
            continue
        try:
            compose("config", overrides=[*chosen, str(override.input_line)])
        except (HydraException, OmegaConfBaseException) as error:
            yield f"{override.input_line}: {_first_line(error)}"


def nearest(name: str, known: Any) -> str:
    """` Did you mean 'x'?`, or nothing where no name is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    if not close:  # the right word at the wrong place: `candidates` for `search.candidates`
        close = [key for key in sorted(known) if key.rpartition(".")[2] == name][:1]
    return f" Did you mean {close[0]!r}?" if close else ""


def _options_of(override: Override) -> list[str | None]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    return [None if value is None else str(value)]


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    """The names of all values; what they refer to is not looked up."""
    for key, value in values.items():
        if key == "_target_":
            continue
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, dict):
            yield from _keys(value, f"{name}.")


def _is_open(whole: DictConfig, name: str) -> bool:
    """Whether a name is missing below a mapping that takes any name."""
    above, _, _ = name.rpartition(".")
    while above:
        node = OmegaConf.select(whole, above, throw_on_missing=False)
        if isinstance(node, DictConfig):
            return OmegaConf.get_type(node) is dict
        above, _, _ = above.rpartition(".")
    return False


def _first_line(error: Exception) -> str:
    """The telling line of a Hydra or OmegaConf error; its cause where that says more."""
    if missing := _missing(error):
        return missing
    cause = _cause(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


def _missing(error: Exception) -> str:
    """Which value was not given; empty where that is not the matter."""
    name = re.search(r"Missing mandatory value: (\S+)", str(_cause(error)))
    return f"{name[1]} has no value. Give it one: {name[1]}=..." if name else ""


def _cause(error: Exception) -> BaseException:
    return error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
