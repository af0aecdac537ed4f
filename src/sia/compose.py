"""The configuration of a command line, composed as `python -m sia` would, without running it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sia import advice, build
from sia.config import Config, register
from sia.errors import ConfigError
from sia.gateway.protocol import Role
from sia.gateway.provider import Provider


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What a command line asks for.

    Attributes:
        choices: The chosen option of each group.
        folder: Where the run directory would be, or lie in.
    """

    cfg: Config
    choices: dict[str, str]
    folder: Path


def composed(argv: Sequence[str]) -> Composed:
    """Composes the configuration of one run.

    Args:
        argv: The command line without the program; other options than `-cd` are ignored.

    Raises:
        ConfigError: It cannot be composed, with every fault in one message.
    """
    if {"-m", "--multirun"} & set(argv):
        raise ConfigError("This looks at one run, not at a grid: leave out -m.")
    overrides, folder = advice.split_arguments(argv)
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(advice.explain(argv, ConfigError("")))
    extra = [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("sia.conf", version_base="1.3"):
            whole = compose("config", overrides=[*extra, *overrides], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(advice.explain(argv, error)) from error
    choices = {str(group): str(option) for group, option in whole.hydra.runtime.choices.items()}
    place = next((word for word in overrides if word.startswith("hydra.run.dir=")), "=runs")
    cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    OmegaConf.resolve(cfg)
    return Composed(
        cfg=cast(Config, cfg), choices=choices, folder=Path(place.partition("=")[2]).expanduser()
    )


def providers(cfg: Config) -> dict[str, tuple[Provider, str]]:
    """Who answers the meta backend (`meta`) and the target (`target`), and the model's exact id.

    A role that asks no model is left out.

    Raises:
        ProviderError: A provider's settings contradict each other.
        ConfigError: A model is wanted and no provider chosen, or a price is incomplete.
    """
    found = {}
    for role, route in build.routes(cfg).items():
        if role is Role.FEEDBACK:
            continue  # as `meta`
        if not route.provider.formats:
            raise ConfigError(
                f"{role}.model={route.model!r} needs a provider. Choose one: provider=... "
                "(python -m sia --help lists them)"
            )
        found[role.value] = route.provider, route.provider.resolve(route.model)
    return found
