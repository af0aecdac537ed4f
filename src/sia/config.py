"""The shape of the configuration: a dataclass per group, registered as Hydra schemas; no logic.

Values live in `conf/`, except where an option has nothing but its defaults to say.
"""

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

# In the names of folders: two processes have been seen to start in the same microsecond.
TOKEN = secrets.token_hex(3)


@dataclass
class TaskConfig:
    """Group `task`."""

    _target_: str = "sia.tasks.open_folder"
    name: str = MISSING
    dir: str = MISSING  # resolved against the working directory, then against the checkout
    source: str | None = None  # one of the further sources in task.yaml; null: the task's own data
    verify_s: float | None = None  # deadline of the verifier; null: the task's own


@dataclass
class ExternalTaskConfig(TaskConfig):
    """task=external; the fields are explained in `sia.tasks.external`."""

    _target_: str = "sia.tasks.external.open_external"
    metric: str | None = None
    direction: str | None = None
    dev_fraction: float | None = 0.5
    id: str | None = None
    submission: list[str] | None = None
    cache: str | None = None


@dataclass
class HarborTaskConfig(TaskConfig):
    """task=harbor; the fields are explained in `sia.tasks.harbor`."""

    _target_: str = "sia.tasks.harbor.open_harbor"
    cache: str | None = None


@dataclass
class MetaConfig:
    """Group `meta`."""

    _target_: str = MISSING


@dataclass
class OptunaConfig(MetaConfig):
    """meta=optuna; the fields are explained in `sia.meta.optuna`."""

    _target_: str = "sia.meta.optuna.OptunaBackend"
    patience: int = 8
    min_gain: float = 0.0
    knobs_per_trial: int = 3
    startup_trials: int = 4
    use_moves: bool = True
    weights_after: int = 3
    max_updates: int = 1


@dataclass
class ScriptedConfig(MetaConfig):
    """meta=scripted."""

    _target_: str = "sia.meta.scripted.Scripted"
    script: str | None = None


@dataclass
class ReplayConfig(MetaConfig):
    """meta=replay."""

    _target_: str = "sia.meta.replay.Replay"
    run: str = MISSING


@dataclass
class AgentConfig(MetaConfig):
    """meta=claude, openhands and pydantic_ai; the fields are explained in `sia.meta.agents`."""

    model: str = MISSING
    max_turns: int = 40
    max_tokens: int | None = None
    session_s: float = 1800.0
    python: str | None = None


@dataclass
class ClaudeConfig(AgentConfig):
    """meta=claude."""

    _target_: str = "sia.meta.agents.Claude"


@dataclass
class OpenHandsConfig(AgentConfig):
    """meta=openhands."""

    _target_: str = "sia.meta.agents.OpenHands"


@dataclass
class PydanticAIConfig(AgentConfig):
    """meta=pydantic_ai."""

    _target_: str = "sia.meta.agents.PydanticAI"


@dataclass
class ServeConfig:
    """How a run serves a local model itself; the fields are explained in `sia.weights.serve`."""

    adapter: str | None = MISSING
    slots: int = MISSING
    threads: int | None = MISSING
    context: int = MISSING
    start_s: float = MISSING


@dataclass
class ProviderConfig:
    """Group `provider`; the fields are explained in `sia.gateway.provider`."""

    name: str = MISSING
    base_url: str | None = None  # of the OpenAI formats, up to /v1; null: not spoken
    anthropic_url: str | None = None  # of the Anthropic format, up to before /v1
    formats: list[str] = field(default_factory=list)  # chat, responses, messages, embeddings
    api_key_env: str | None = None  # the variable that holds the key; null: none is needed
    models: dict[str, str] = field(default_factory=dict)  # alias -> exact model id
    prices_as_of: str | None = None
    # USD per million tokens: model id -> input, output and, where they differ, cached, cache_write
    prices: dict[str, Any] = field(default_factory=dict)
    serve: ServeConfig | None = None  # the run starts the server itself; null: somebody else does


@dataclass
class GatewayConfig:
    """How model calls are made and kept; the fields are explained in `sia.gateway`."""

    mode: str = MISSING  # live, record, replay or cache
    recording: str | None = MISSING  # a run directory, for replay
    cache: str | None = MISSING  # a folder, for cache; null: ~/.cache/sia/calls
    call_s: float = MISSING  # deadline of one call, its retries included
    concurrency: int = MISSING  # calls in flight at once; more wait


@dataclass
class TargetConfig:
    """Group `target`."""

    harness: str = MISSING  # `reference`, a harness that the task names, a file, or a folder
    settings: dict[str, Any] = field(default_factory=dict)  # put into the first harness.yaml
    model: str | None = None  # what SIA_MODEL tells the target; null: it has none
    provider: ProviderConfig | None = None  # null: the run's
    policy: dict[str, Any] = field(default_factory=dict)  # of updates of the weights; see docs
    attempt_s: float | None = None  # deadline of one attempt; null: the task's own
    update_s: float = 3600  # deadline of one update of its weights
    update_cache: str | None = None  # folder of updates that runs share; null: every one is made
    threads: int = 2  # of numerical libraries; part of the result's definition, not of the machine
    environments: str | None = None  # where environments are kept; null: ~/.cache/sia/environments


@dataclass
class WeightsConfig:
    """Group `weights`."""

    _target_: str = MISSING
    name: str = MISSING


@dataclass
class NoUpdateConfig(WeightsConfig):
    """weights=none."""

    _target_: str = "sia.weights.recipes.NoUpdate"
    name: str = "none"


@dataclass
class AutoConfig(WeightsConfig):
    """weights=auto."""

    _target_: str = "sia.weights.recipes.Auto"
    name: str = "auto"
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class RecipeConfig(WeightsConfig):
    """What all recipes share; the fields are explained in `sia.weights.recipes`."""

    steps: int = 50
    lr: float = 1e-4
    head_lr: float | None = None
    warmup: int = 5
    decay: str = "none"
    weight_decay: float = 0.0
    batch: int | None = None
    micro_batch: int | None = None
    max_grad_norm: float = 1.0
    rank: int = 16
    alpha: float = 32.0
    dora: bool = False
    targets: str = "all-linear"
    average: str = "token"


@dataclass
class SftConfig(RecipeConfig):
    """weights=sft."""

    _target_: str = "sia.weights.recipes.Sft"
    name: str = "sft"
    lr: float = 2e-4
    batch: int | None = 16


@dataclass
class OnPolicyConfig(RecipeConfig):
    """What recipes share that learn from the policy's own answers."""

    items: int = 16
    group: int = 8
    temperature: float = 1.0
    epochs: int = 1
    kl_coef: float = 0.0
    kl_estimator: str = "k3_weighted"


@dataclass
class BestOfNConfig(OnPolicyConfig):
    """weights=best_of_n."""

    _target_: str = "sia.weights.recipes.BestOfN"
    name: str = "best_of_n"
    group: int = 16
    top_k: int = 1


@dataclass
class ReinforceConfig(OnPolicyConfig):
    """weights=reinforce."""

    _target_: str = "sia.weights.recipes.Reinforce"
    name: str = "reinforce"
    kl_coef: float = 0.02
    baseline: str = "leave_one_out"


@dataclass
class GrpoConfig(OnPolicyConfig):
    """weights=grpo."""

    _target_: str = "sia.weights.recipes.Grpo"
    name: str = "grpo"
    average: str = "sequence"
    clip_low: float = 0.2
    clip_high: float = 0.2
    baseline: str = "mean"
    scale: str = "group"


@dataclass
class PpoConfig(OnPolicyConfig):
    """weights=ppo."""

    _target_: str = "sia.weights.recipes.Ppo"
    name: str = "ppo"
    epochs: int = 2
    kl_coef: float = 0.02
    kl_estimator: str = "k1"
    clip_low: float = 0.2
    clip_high: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.5
    value_clip: float | None = 0.2
    entropy_coef: float = 0.0
    whiten: bool = True


@dataclass
class EntropicConfig(OnPolicyConfig):
    """weights=entropic."""

    _target_: str = "sia.weights.recipes.Entropic"
    name: str = "entropic"
    kl_coef: float = 0.02
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.6931471805599453  # ln 2
    cap: float = 10.0


@dataclass
class DpoConfig(OnPolicyConfig):
    """weights=dpo."""

    _target_: str = "sia.weights.recipes.Dpo"
    name: str = "dpo"
    beta: float = 0.1


@dataclass
class SearchConfig:
    """Group `search`."""

    _target_: str = MISSING


@dataclass
class ChainConfig(SearchConfig):
    """search=chain."""

    _target_: str = "sia.search.Chain"


@dataclass
class KeepBestConfig(SearchConfig):
    """search=keep_best and search=best_of_n."""

    _target_: str = "sia.search.KeepBest"
    candidates: int = MISSING


@dataclass
class ArchiveConfig(SearchConfig):
    """search=archive; the fields are explained in `sia.search.tree`."""

    _target_: str = "sia.search.Archive"
    candidates: int = 2
    steepness: float = 10.0
    midpoint: float = 0.5


@dataclass
class PuctConfig(SearchConfig):
    """search=puct; the fields are explained in `sia.search.tree`."""

    _target_: str = "sia.search.Puct"
    candidates: int = 2
    exploration: float = 1.0


@dataclass
class FeedbackConfig:
    """Group `feedback`."""

    _target_: str = MISSING


@dataclass
class ScoresConfig(FeedbackConfig):
    """feedback=scores."""

    _target_: str = "sia.feedback.Scores"


@dataclass
class BlindConfig(FeedbackConfig):
    """feedback=blind."""

    _target_: str = "sia.feedback.Blind"


@dataclass
class FailuresConfig(FeedbackConfig):
    """feedback=failures."""

    _target_: str = "sia.feedback.Failures"
    items: int = 20  # failed dev items that are shown, at most 20


@dataclass
class TracesConfig(FeedbackConfig):
    """feedback=traces."""

    _target_: str = "sia.feedback.Traces"
    items: int = 20  # failed dev items that are shown, at most 20
    trajectories: int = 5  # at most


@dataclass
class SandboxLimits:
    """What one attempt may use; see `sia.sandbox.protocol.Limits`."""

    memory_mib: int | None = None  # null: the task's own
    processes: int = 256
    file_mib: int = 512
    disk_mib: int = 1024
    output_kib: int = 256


@dataclass
class SandboxConfig:
    """Group `sandbox`."""

    _target_: str = MISSING
    limits: SandboxLimits = field(default_factory=SandboxLimits)


@dataclass
class AutoSandboxConfig(SandboxConfig):
    """sandbox=auto."""

    _target_: str = "sia.sandbox.auto.auto"


@dataclass
class BwrapConfig(SandboxConfig):
    """sandbox=bwrap."""

    _target_: str = "sia.sandbox.Bwrap"
    tmp_mib: int = 1024  # private /tmp, in memory


@dataclass
class DockerConfig(SandboxConfig):
    """sandbox=docker."""

    _target_: str = "sia.sandbox.Docker"
    image: str = "python:3.11-slim"
    cpus: float | None = None  # null: no limit


@dataclass
class ProcessConfig(SandboxConfig):
    """sandbox=process."""

    _target_: str = "sia.sandbox.Process"


@dataclass
class TrackingConfig:
    """Group `tracking`."""

    _target_: str = MISSING


@dataclass
class MlflowConfig(TrackingConfig):
    """tracking=mlflow."""

    _target_: str = "sia.tracking.MlflowMirror"
    uri: str | None = None  # null: MLFLOW_TRACKING_URI, else SQLite in the working directory
    artifacts: str | None = None  # null: beside the database
    drain_s: float = 60.0  # how long the end of a run waits for the mirror


@dataclass
class NoTrackingConfig(TrackingConfig):
    """tracking=none."""

    _target_: str = "sia.tracking.NoTracking"


@dataclass
class BudgetConfig:
    """What a run may use; reaching a limit ends it cleanly."""

    wall_s: float | None = MISSING
    usd: float | None = MISSING
    tokens: int | None = MISSING
    requests: int | None = MISSING


@dataclass
class ExamConfig:
    """How the sealed test is opened."""

    final_refit: bool = MISSING


@dataclass
class Config:
    """The whole configuration of one run."""

    task: TaskConfig = field(default_factory=TaskConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    provider: ProviderConfig = field(default_factory=ProviderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    exam: ExamConfig = field(default_factory=ExamConfig)
    levers: list[str] = MISSING
    generations: int = MISSING
    seed: int = MISSING
    workers: int = MISSING
    web: bool = MISSING
    resume: str | None = MISSING
    trusted_packages: list[str] = MISSING


SCHEMAS: dict[str, dict[str, type]] = {
    "task": {"external": ExternalTaskConfig, "harbor": HarborTaskConfig},
    "meta": {
        "optuna": OptunaConfig,
        "scripted": ScriptedConfig,
        "replay": ReplayConfig,
        "claude": ClaudeConfig,
        "openhands": OpenHandsConfig,
        "pydantic_ai": PydanticAIConfig,
    },
    "weights": {
        "none": NoUpdateConfig,
        "auto": AutoConfig,
        "sft": SftConfig,
        "best_of_n": BestOfNConfig,
        "reinforce": ReinforceConfig,
        "grpo": GrpoConfig,
        "ppo": PpoConfig,
        "entropic": EntropicConfig,
        "dpo": DpoConfig,
    },
    "search": {
        "chain": ChainConfig,
        "keep_best": KeepBestConfig,
        "archive": ArchiveConfig,
        "puct": PuctConfig,
    },
    "feedback": {
        "scores": ScoresConfig,
        "blind": BlindConfig,
        "failures": FailuresConfig,
        "traces": TracesConfig,
    },
    "sandbox": {
        "auto": AutoSandboxConfig,
        "bwrap": BwrapConfig,
        "docker": DockerConfig,
        "process": ProcessConfig,
    },
    "tracking": {"mlflow": MlflowConfig, "none": NoTrackingConfig},
}


def register() -> None:
    """Makes the schemas known to Hydra; needed before any composition. May be called again."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_")
    for group, options in SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=f"schema/{group}", name=name, node=schema)
    OmegaConf.register_new_resolver("sia_token", lambda: TOKEN, replace=True)
    OmegaConf.register_new_resolver(
        "sia_folder", lambda path: Path(path).expanduser().resolve().name, replace=True
    )
    OmegaConf.register_new_resolver("sia_generations", _generations, replace=True)
    OmegaConf.register_new_resolver(
        "sia_run_dir", lambda resume, fresh: resume or fresh, replace=True
    )


def _generations(evaluations: int, *, _root_: Any) -> int:
    """How many generations make so many evaluations, the one of the first harness included."""
    candidates = OmegaConf.select(_root_, "search.candidates", default=1)
    return 1 + (evaluations - 1) // int(candidates)
