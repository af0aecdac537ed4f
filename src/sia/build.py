"""From a configuration to the parts of a run: the only caller of `hydra.utils.instantiate`."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sia import loop
from sia.config import Config, ProviderConfig
from sia.errors import ConfigError, MetaBackendError, SiaError
from sia.gateway.protocol import Gateway, Role
from sia.meta import MetaBackend
from sia.meta.agents import Agent
from sia.records import Lever
from sia.rundir import RunDir
from sia.sandbox import Environments, Limits, Sandbox
from sia.sandbox.environments import holds
from sia.target import HarnessRunner
from sia.tasks import Task
from sia.tasks.task import ENTRY_POINT
from sia.tracking import Tracker
from sia.verify import TaskVerifier
from sia.workspace import Workspaces

if TYPE_CHECKING:
    from sia.gateway import Route


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What can be built before a run directory exists, so that a mistake leaves nothing behind."""

    task: Task
    first_harness: Path
    sandbox: Sandbox
    target: HarnessRunner
    tracker: Tracker
    meta: Any
    search: Any
    feedback: Any

    def check_machine(self) -> None:
        """Whether targets, and the agent where there is one, can be started on this machine.

        Raises:
            TargetError: The sandbox does not work, or the data cannot be shown in it.
            MetaBackendError: The agent's interpreter lacks its SDK, or has the task's answers.
        """
        self.target.check()
        if not isinstance(self.meta, Agent):
            return
        self.sandbox.check()
        if name := holds(self.meta.runtime(), self.task.source_packages):
            raise MetaBackendError(
                f"The package {name!r} is installed where meta={self.meta.name} can read it, and "
                f"it holds the answers of the task. Remove it: pip uninstall {name}"
            )


def check(cfg: Config) -> Checked:
    """Builds and validates all parts that need no run directory.

    Raises:
        ConfigError: Values out of range, all of them in one message.
        SiaError: Whatever a part says about its own settings.
    """
    faults = [
        f"{key} has no value. Give it one: {key}=..."
        for key in sorted(OmegaConf.missing_keys(cast(Any, cfg)))
    ] or _faults(cfg)
    if faults:
        raise ConfigError("\n".join(faults))
    task = _task(cfg)
    sandbox_node = OmegaConf.masked_copy(
        cast(Any, cfg.sandbox), [key for key in cast(Any, cfg.sandbox) if key != "limits"]
    )
    sandbox = part(sandbox_node, cfg.trusted_packages)
    meta = part(cfg.meta, cfg.trusted_packages)
    if isinstance(meta, Agent) and meta.format not in cfg.provider.formats:
        raise ConfigError(
            f"meta={meta.name} speaks the format {meta.format!r}, and provider "
            f"{cfg.provider.name!r} only {', '.join(cfg.provider.formats)}. Choose another "
            "provider=..., or another meta=..."
        )
    return Checked(
        task=task,
        first_harness=_harness(cfg, task),
        sandbox=sandbox,
        target=target(cfg, task, sandbox),
        tracker=part(cfg.tracking, cfg.trusted_packages),
        meta=meta,
        search=part(cfg.search, cfg.trusted_packages),
        feedback=part(cfg.feedback, cfg.trusted_packages),
    )


def target(
    cfg: Config,
    task: Task,
    sandbox: Sandbox,
    *,
    data: Path | None = None,
    gateway: Gateway | None = None,
) -> HarnessRunner:
    """The runner of candidates.

    Args:
        cfg: The whole configuration.
        task: What they work on.
        sandbox: What confines them.
        data: Stands in for the task's public side.
        gateway: Where those that were given a model find it.
    """
    cache = Path(cfg.target.environments).expanduser() if cfg.target.environments else None
    return HarnessRunner(
        sandbox=sandbox,
        environments=Environments(cache),
        task=task,
        limits=_attempt_limits(cfg, task),
        data=data,
        gateway=gateway if cfg.target.model else None,
    )


def _attempt_limits(cfg: Config, task: Task) -> Limits:
    limits = cfg.sandbox.limits
    return Limits(
        memory_mib=limits.memory_mib or task.facts.limits.memory_mib,
        processes=limits.processes,
        file_mib=limits.file_mib,
        disk_mib=limits.disk_mib,
        output_kib=limits.output_kib,
        threads=cfg.target.threads,
    )


def gateway(
    cfg: Config, run: Path, roles: Collection[Role] = tuple(Role)
) -> AbstractContextManager[Gateway | None]:
    """The way to the models of a run; None where no part of it asks one.

    Args:
        cfg: The whole configuration.
        run: The run directory, where calls are recorded.
        roles: Who will ask.

    Raises:
        ProviderError: A key, a price or a recording is missing.
    """
    asked = {role: route for role, route in routes(cfg).items() if role in roles}
    if not asked:
        return nullcontext()
    from sia.gateway import Budget, ModelGateway
    from sia.gateway.store import STORE_FILE

    settings = cfg.gateway
    return ModelGateway(
        store=run / STORE_FILE,
        routes=asked,
        mode=settings.mode,
        recording=Path(settings.recording) if settings.recording else None,
        cache=Path(settings.cache).expanduser() if settings.cache else None,
        budget=Budget(usd=cfg.budget.usd, tokens=cfg.budget.tokens, requests=cfg.budget.requests),
        call_s=settings.call_s,
        concurrency=settings.concurrency,
    )


def routes(cfg: Config) -> "dict[Role, Route]":
    """Provider and model of everybody who asks one."""
    found: dict[Role, Route] = {}
    if (model := getattr(cfg.meta, "model", None)) is not None:
        found |= dict.fromkeys((Role.META, Role.FEEDBACK), _route(cfg.provider, model))
    if cfg.target.model is not None:
        found[Role.TARGET] = _route(cfg.target.provider or cfg.provider, cfg.target.model)
    return found


def _route(provider: ProviderConfig, model: str) -> "Route":
    from sia.gateway import Price, Provider, Route

    try:
        prices = {name: Price(**price) for name, price in provider.prices.items()}
    except TypeError as error:
        raise ConfigError(
            f"provider.prices of {provider.name!r} are {dict(provider.prices)!r}: each model needs "
            "input and output, and may have cached and cache_write (USD per million tokens)."
        ) from error
    return Route(
        provider=Provider(
            name=provider.name,
            base_url=provider.base_url or "",
            anthropic_url=provider.anthropic_url or "",
            formats=tuple(provider.formats),
            api_key_env=provider.api_key_env or "",
            models=dict(provider.models),
            prices=prices,
            prices_as_of=provider.prices_as_of or "",
        ),
        model=model,
    )


def _meta(cfg: Config, checked: Checked, run: RunDir, gateway: Gateway | None) -> MetaBackend:
    """The meta backend itself; where the configuration names an agent, the backend around it."""
    if not isinstance(checked.meta, Agent):
        return cast(MetaBackend, checked.meta)
    assert gateway is not None  # an agent has a model
    from sia.meta.agent import AgentBackend
    from sia.meta.session import Sessions

    task, wall_s = checked.task, cfg.budget.wall_s
    return AgentBackend(
        sessions=Sessions(
            agent=checked.meta,
            sandbox=checked.sandbox,
            gateway=gateway,
            data=task.public_dir,
            left_s=lambda: math.inf if wall_s is None else wall_s - run.journal.elapsed_s,
        ),
        task=task,
        run=run.path,
        attempt_s=limits(cfg, task).attempt_s,
        limits=_attempt_limits(cfg, task),
        target_model=cfg.target.model is not None,
    )


def parts(cfg: Config, checked: Checked, run: RunDir, gateway: Gateway | None = None) -> loop.Parts:
    """Everything the loop needs, bound to a run directory. Starts the verifier's process."""
    return loop.Parts(
        metric=checked.task.metric,
        meta=_meta(cfg, checked, run, gateway),
        target=target(cfg, checked.task, checked.sandbox, gateway=gateway),
        verifier=TaskVerifier(task=checked.task, split="dev", deadline_s=cfg.task.verify_s),
        search=checked.search,
        feedback=checked.feedback,
        journal=run.journal,
        workspaces=Workspaces(run=run.path, first=checked.first_harness),
        levers=(Lever.HARNESS, Lever.STOP),
        state=run.path / "meta",
        seed=cfg.seed,
    )


def limits(cfg: Config, task: Task) -> loop.Limits:
    """How far the loop goes."""
    return loop.Limits(
        generations=cfg.generations,
        workers=cfg.workers,
        attempt_s=cfg.target.attempt_s or task.facts.limits.attempt_s,
        wall_s=cfg.budget.wall_s,
    )


def part(node: Any, trusted: Sequence[str]) -> Any:
    """Instantiates one node of the configuration.

    Raises:
        ConfigError: Its `_target_` lies outside SIA and the trusted packages, or does not fit.
        SiaError: What the part's own constructor raised.
    """
    name = str(node["_target_"])
    if name.split(".")[0] not in ("sia", *trusted):
        raise ConfigError(
            f"_target_={name!r} is not part of sia. If you trust its package, say so: "
            f"trusted_packages=[{name.split('.')[0]}]"
        )
    try:
        return instantiate(node, _convert_="object", _recursive_=False)
    except InstantiationException as error:
        # Hydra wraps whatever a constructor raises; our own messages and exit codes must survive.
        if isinstance(error.__cause__, SiaError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError | ImportError | AttributeError):
            raise ConfigError(f"{name} cannot be built: {error.__cause__}") from error
        raise


def _task(cfg: Config) -> Task:
    """What `task._target_` makes of the folder."""
    settings = [key for key in cast(Any, cfg.task) if key not in ("name", "verify_s")]
    return cast(
        Task, part(OmegaConf.masked_copy(cast(Any, cfg.task), settings), cfg.trusted_packages)
    )


def _faults(cfg: Config) -> list[str]:
    """Every value that is out of range, one line each."""
    wrong = list(_provider_faults(cfg))
    for name, value in (
        ("generations", cfg.generations),
        ("workers", cfg.workers),
        ("target.threads", cfg.target.threads),
        ("sandbox.limits.processes", cfg.sandbox.limits.processes),
    ):
        if value < 1:
            wrong.append(f"{name}={value} must be at least 1.")
    for name, seconds in (
        ("budget.wall_s", cfg.budget.wall_s),
        ("target.attempt_s", cfg.target.attempt_s),
        ("task.verify_s", cfg.task.verify_s),
    ):
        if seconds is not None and seconds <= 0:
            wrong.append(f"{name}={seconds:g} must be more than 0 seconds, or null.")
    return wrong


def _provider_faults(cfg: Config) -> Iterator[str]:
    """Models without somebody who answers for them."""
    asked = {"meta": getattr(cfg.meta, "model", None), "target": cfg.target.model}
    for who, model in asked.items():
        provider = cfg.target.provider if who == "target" and cfg.target.provider else cfg.provider
        if model is not None and not provider.formats:
            yield (
                f"{who}.model={model!r} needs a provider, and provider={provider.name!r} answers "
                "nothing. Choose one: provider=anthropic, provider=ollama (local, no key), ..."
            )


def _harness(cfg: Config, task: Task) -> Path:
    """The folder, or the one file, that the first candidate is a copy of."""
    name = cfg.target.harness
    if known := task.harnesses.get(name):
        return known
    path = Path(name).expanduser()
    if (path / ENTRY_POINT).is_file() or (path.suffix == ".py" and path.is_file()):
        return path.resolve()
    raise ConfigError(
        f"target.harness={name!r} is neither a harness of task {task.name!r} "
        f"({', '.join(task.harnesses)}), nor a .py file, nor a folder with a {ENTRY_POINT}, seen "
        f"from {Path.cwd()}. Start from a copy: cp -r {task.reference_harness} my_harness"
    )
