"""From a configuration to the parts of a run: the only caller of `hydra.utils.instantiate`."""

import atexit
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sia import loop
from sia.config import Config, ProviderConfig, ServeConfig
from sia.errors import ConfigError, MetaBackendError, SiaError, WeightsError
from sia.gateway.protocol import Gateway, Role
from sia.meta import MetaBackend
from sia.meta.agents import Agent
from sia.meta.knobs import write_knobs
from sia.records import Lever
from sia.rundir import RunDir
from sia.sandbox import Environments, Limits, Sandbox
from sia.sandbox.environments import holds
from sia.target import HarnessRunner
from sia.tasks import Task
from sia.tasks.task import ENTRY_POINT
from sia.tracking import Tracker
from sia.verify import TaskVerifier
from sia.weights.lever import TRAIN, NoWeights, Updates
from sia.weights.protocol import WeightUpdate
from sia.weights.recipes import RECIPES, Auto, NoUpdate, Recipe
from sia.weights.recipes import recipe as find_recipe
from sia.workspace import Workspaces

if TYPE_CHECKING:
    from sia.gateway import ModelGateway, Route
    from sia.weights.local import LocalModel


LOCAL_LOG = "local-model.log"  # what the server of a local model printed


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
    weights: Any
    policy: dict[str, Any] | None  # what updates of the weights train

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
    weights = part(cfg.weights, cfg.trusted_packages)
    return Checked(
        task=task,
        first_harness=_with_settings(_harness(cfg, task), cfg.target.settings),
        sandbox=sandbox,
        target=target(cfg, task, sandbox),
        tracker=part(cfg.tracking, cfg.trusted_packages),
        meta=meta,
        search=part(cfg.search, cfg.trusted_packages),
        feedback=part(cfg.feedback, cfg.trusted_packages),
        weights=weights,
        policy=None if isinstance(weights, NoUpdate) else _policy(cfg, task),
    )


def place_harness(cfg: Config, checked: Checked) -> None:
    """Names the first harness by its folder, where the task has no name for it.

    So a run can be resumed from another working directory.
    """
    if cfg.target.harness not in checked.task.harnesses:
        cfg.target.harness = str(checked.first_harness)


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

    Entering it starts the servers of local models, and leaving it ends them.

    Args:
        cfg: The whole configuration.
        run: The run directory, where calls are recorded.
        roles: Who will ask.

    Raises:
        ProviderError: A key, a price, a recording or a local model is missing.
    """
    local = local_models(cfg, run)
    asked = {role: route for role, route in routes(cfg, local).items() if role in roles}
    local = {role: model for role, model in local.items() if role in roles}
    if not asked:
        return nullcontext()
    from sia.gateway import Budget, ModelGateway
    from sia.gateway.store import STORE_FILE

    settings = cfg.gateway
    if settings.mode != "replay":
        for served in local.values():
            served.check()
    gateway = ModelGateway(
        store=run / STORE_FILE,
        routes=asked,
        mode=settings.mode,
        recording=Path(settings.recording) if settings.recording else None,
        cache=Path(settings.cache).expanduser() if settings.cache else None,
        budget=Budget(usd=cfg.budget.usd, tokens=cfg.budget.tokens, requests=cfg.budget.requests),
        call_s=settings.call_s,
        concurrency=settings.concurrency,
        trained=_trained(cfg, run) if Role.TARGET in local else None,
    )
    return (
        gateway
        if settings.mode == "replay"
        else _behind(gateway, list(dict.fromkeys(local.values())))
    )


@contextmanager
def _behind(gateway: "ModelGateway", local: "Sequence[LocalModel]") -> Iterator[Gateway]:
    """The gateway, while the servers that it sends calls to are running."""
    with ExitStack() as stack:
        for model in local:
            stack.enter_context(model)
        yield stack.enter_context(gateway)


def _trained(cfg: Config, run: Path) -> "Callable[[Path], AbstractContextManager[Route]]":
    """The way to the target's own model with an adapter: served for as long as it is asked."""
    provider, model = _asked(cfg)[Role.TARGET]
    settings = provider.serve
    assert settings is not None  # else it is not served here

    @contextmanager
    def serve(adapter: Path) -> "Iterator[Route]":
        served = _local_model(settings, model, run, adapter=adapter)
        with nullcontext() if cfg.gateway.mode == "replay" else served:
            yield _route(provider, model, served)

    return serve


def routes(cfg: Config, local: "Mapping[Role, LocalModel] | None" = None) -> "dict[Role, Route]":
    """Provider and model of everybody who asks one.

    Args:
        cfg: The whole configuration.
        local: From `local_models`; None where nothing will be asked.
    """
    served = local_models(cfg, Path()) if local is None else local
    return {
        role: _route(provider, model, served.get(role))
        for role, (provider, model) in _asked(cfg).items()
    }


def local_models(cfg: Config, run: Path) -> "dict[Role, LocalModel]":
    """The models that the run serves itself; roles with the same model share one."""
    found: dict[Role, LocalModel] = {}
    for role, (provider, model) in _asked(cfg).items():
        if provider.serve is not None:
            made = _local_model(provider.serve, model, run)
            found[role] = next((one for one in found.values() if one.id == made.id), made)
    return found


def _asked(cfg: Config) -> dict[Role, tuple[ProviderConfig, str]]:
    """Provider and model of each role that asks one."""
    asked: dict[Role, tuple[ProviderConfig, str]] = {}
    if (model := getattr(cfg.meta, "model", None)) is not None:
        asked |= dict.fromkeys((Role.META, Role.FEEDBACK), (cfg.provider, model))
    if cfg.target.model is not None:
        asked[Role.TARGET] = (cfg.target.provider or cfg.provider, cfg.target.model)
    return asked


def _route(provider: ProviderConfig, model: str, served: "LocalModel | None" = None) -> "Route":
    """Who answers; `served` is the model where the run serves it itself."""
    from sia.gateway import Price, Provider, Route

    try:
        prices = {name: Price(**price) for name, price in provider.prices.items()}
    except TypeError as error:
        raise ConfigError(
            f"provider.prices of {provider.name!r} are {dict(provider.prices)!r}: each model needs "
            "input and output, and may have cached and cache_write (USD per million tokens)."
        ) from error
    if served is not None:
        prices = {served.id: Price(input=0.0, output=0.0)}
    return Route(
        provider=Provider(
            name=provider.name,
            base_url=served.url if served else provider.base_url or "",
            anthropic_url=provider.anthropic_url or "",
            formats=tuple(provider.formats),
            api_key_env=provider.api_key_env or "",
            models={model: served.id} if served else dict(provider.models),
            prices=prices,
            prices_as_of=provider.prices_as_of or "",
        ),
        model=model,
    )


def _local_model(
    serve: ServeConfig, model: str, run: Path, *, adapter: Path | None = None
) -> "LocalModel":
    from sia.weights.local import LocalModel

    return LocalModel(
        model=model,
        log=run / LOCAL_LOG,
        adapter=adapter or _adapter(serve),
        slots=serve.slots,
        threads=serve.threads,
        context=serve.context,
        start_s=serve.start_s,
    )


def _adapter(serve: ServeConfig) -> Path | None:
    return Path(serve.adapter).expanduser().resolve() if serve.adapter else None


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


def _weights(cfg: Config, checked: Checked) -> WeightUpdate:
    if checked.policy is None:
        return NoWeights()
    from sia.weights.models import training_base

    serve = cfg.target.provider.serve if cfg.target.provider else None
    return Updates(
        recipes=_recipes(checked),
        task=checked.task,
        policy={**checked.policy, "base": training_base(str(checked.policy["base"]))},
        first=_adapter(serve) if serve else None,
        sandbox=checked.sandbox,
        threads=cfg.target.threads,
        cache=Path(cfg.target.update_cache).expanduser() if cfg.target.update_cache else None,
    )


def _recipes(checked: Checked) -> dict[str, Recipe]:
    """The menu of the weights lever.

    Raises:
        WeightsError: A recipe is unknown, or a setting of one is.
    """
    chosen = checked.weights
    if not isinstance(chosen, Auto):
        return {chosen.name: chosen}
    settings: dict[str, dict[str, Any]] = {name: {} for name in RECIPES}
    for source in (checked.task.facts.recipes, chosen.recipes):
        for name, given in source.items():
            settings[name] = {**settings.get(name, {}), **given}
    return {name: find_recipe({"name": name, **given}) for name, given in settings.items()}


def _policy(cfg: Config, task: Task) -> dict[str, Any]:
    """What is trained: the target's own model where the run serves it, else what the task names.

    Raises:
        WeightsError: There is nothing to train, or nothing to train it on.
        ProviderError: The base is not on this machine.
    """
    policy: dict[str, Any] = dict(task.facts.policy)
    provider, model = _asked(cfg).get(Role.TARGET, (None, None))
    if provider is not None and provider.serve is not None:
        policy = {"kind": "causal_lm", "base": model}
    if not policy or not (task.root / TRAIN).is_file():
        raise WeightsError(
            f"weights={cfg.weights.name} has nothing to train in task {task.name!r}: that needs a "
            f"{TRAIN} in its folder, and a `policy` in its task.yaml or a target whose model "
            "runs here (target=smollm2). Without the lever: weights=none"
        )
    from sia.weights.models import check_training_base

    policy |= cfg.target.policy
    check_training_base(str(policy["base"]))
    return policy


def parts(cfg: Config, checked: Checked, run: RunDir, gateway: Gateway | None = None) -> loop.Parts:
    """Everything the loop needs, bound to a run directory. Starts the verifier's process."""
    weights = _weights(cfg, checked)
    return loop.Parts(
        metric=checked.task.metric,
        meta=_meta(cfg, checked, run, gateway),
        target=target(cfg, checked.task, checked.sandbox, gateway=gateway),
        verifier=TaskVerifier(task=checked.task, split="dev", deadline_s=cfg.task.verify_s),
        search=checked.search,
        feedback=checked.feedback,
        journal=run.journal,
        workspaces=Workspaces(run=run.path, first=checked.first_harness),
        weights=weights,
        levers=tuple(
            lever for lever in map(Lever, cfg.levers) if lever is not Lever.WEIGHTS or weights.menu
        ),
        references=(checked.task.root / TRAIN).is_file(),
        state=run.path / "meta",
        seed=cfg.seed,
    )


def limits(cfg: Config, task: Task) -> loop.Limits:
    """How far the loop goes."""
    return loop.Limits(
        generations=cfg.generations,
        workers=cfg.workers,
        attempt_s=cfg.target.attempt_s or task.facts.limits.attempt_s,
        update_s=cfg.target.update_s,
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
    unset = {"source"} if cast(Any, cfg.task).get("source") is None else set()
    settings = [key for key in cast(Any, cfg.task) if key not in {"name", "verify_s"} | unset]
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
        ("target.update_s", cfg.target.update_s),
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


def _with_settings(harness: Path, settings: Mapping[str, Any]) -> Path:
    """A copy of the harness with other values in its `harness.yaml`; gone when the process ends.

    Raises:
        ConfigError: It has no such settings.
    """
    if not settings:
        return harness
    file = harness / "harness.yaml"
    known = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    changes = dict(_flat(OmegaConf.to_container(cast(Any, settings), resolve=True), known, harness))
    folder = Path(tempfile.mkdtemp(prefix="sia-harness-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / harness.name
    shutil.copytree(harness, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    write_knobs(copy, changes)
    return copy


def _flat(
    settings: Any, known: Any, harness: Path, prefix: str = ""
) -> Iterator[tuple[str, object]]:
    """Dotted name and value of each setting; `known` says what is a group and what a value."""
    for name, value in settings.items():
        if not isinstance(known, dict) or name not in known:
            there = ", ".join(known) if isinstance(known, dict) and known else "none"
            raise ConfigError(
                f"target.settings names {prefix + name!r}, which harness.yaml in {harness} "
                f"does not have (there: {there}). Leave it out: '~target.settings.{prefix + name}'"
            )
        if isinstance(value, dict) and known[name] != {}:
            yield from _flat(value, known[name], harness, f"{prefix}{name}.")
        else:
            yield prefix + name, value
