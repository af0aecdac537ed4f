"""Hydra plugins for grids in which a run that dies takes no other with it.

`GridSweeper` is Hydra's basic sweeper, and hears out every run before it says which failed.
`SubmititLauncher` and `RayLauncher` give each run a process of its own. A run that its cluster
starts again (Slurm after a preemption, Ray with `max_retries`) goes on from its journal.

They lie outside of `sia` because Hydra takes launchers and sweepers from `hydra_plugins` only.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from sia import config as schemas
from sia.errors import ConfigError
from sia.multirun import Failure, GridFailed, RunFailed, ended, override, summary
from sia.rundir import RUN_FILE

# Settings that submitit knows for every kind of cluster; all others carry the kind's name.
SHARED = {
    "cpus_per_task", "gpus_per_node", "mem_gb", "name", "nodes", "stderr_to_stdout",
    "tasks_per_node", "timeout_min",
}  # fmt: skip
POLL_S = 0.1
LAUNCHERS = ("ray", "submitit_local", "submitit_slurm")  # in conf/hydra/launcher


def replace_others() -> None:
    """Forgets the schemas of other plugins whose launchers have the names of ours.

    Whoever has them installed would see our settings checked against theirs.
    """
    known = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name in LAUNCHERS:
        known.pop(f"{name}.yaml", None)


class GridSweeper(BasicSweeper):
    """Runs the whole grid, then raises one error that names every run that did not finish."""

    def sweep(self, arguments: list[str]) -> Any:
        """The results of all runs.

        Raises:
            GridFailed: Some did not finish; the others did.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir).absolute()
        # A name that holds the time is made once, not again in the process of each run.
        with open_dict(self.config):
            self.config.hydra.overrides.hydra.append(override("hydra.sweep.dir", folder))
            self.config.hydra.sweep.dir = str(folder)
        patient = _Patient(self.launcher, self.hydra_context, self.config)
        self.launcher = patient
        results = super().sweep(arguments)
        if patient.failures:
            raise GridFailed(summary(patient.failures, overrides=patient.overrides, folder=folder))
        return results


class _Patient(Launcher):
    """Hands on the runs that finished and keeps the others for the end."""

    def __init__(self, launcher: Launcher, context: HydraContext, config: DictConfig) -> None:
        self._launcher = launcher
        self._context = context
        self._config = config
        self.failures: list[Failure] = []
        self.overrides: list[Sequence[str]] = []

    def setup(self, **_: Any) -> None:
        """Does nothing: the launcher has been set up."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """The results of the runs that finished."""
        results: Sequence[JobReturn]
        try:
            results = self._launcher.launch(job_overrides, initial_job_idx)
        except BrokenProcessPool:  # joblib gives up all that has not ended
            results = [_lost(overrides) for overrides in job_overrides]
        self.overrides += job_overrides
        finished = []
        for number, (overrides, result) in enumerate(
            zip(job_overrides, results, strict=True), initial_job_idx
        ):
            folder = self._folder(result, overrides, number)
            if result.status is JobStatus.COMPLETED:
                finished.append(result)
            elif not ended(folder):
                error = result._return_value
                self.failures.append(
                    Failure(
                        number=number,
                        overrides=tuple(overrides),
                        folder=folder,
                        reason=str(error),
                        log=getattr(error, "log", ""),
                    )
                )
        return finished

    def _folder(self, result: JobReturn, overrides: Sequence[str], number: int) -> Path:
        if result.hydra_cfg is not None:
            return Path(result.hydra_cfg.hydra.runtime.output_dir)
        cfg = _composed(self._context, self._config, overrides, number, str(number))
        return Path(cfg.hydra.sweep.dir) / str(cfg.hydra.sweep.subdir)


@dataclass(frozen=True)
class _Run:
    """What the process of a run needs; calling it is the run. It is pickled."""

    context: HydraContext
    config: DictConfig
    task_function: TaskFunction
    singletons: Any
    cwd: str

    def __call__(self, overrides: Sequence[str], number: int) -> JobReturn:
        os.chdir(self.cwd)
        Singleton.set_state(self.singletons)
        setup_globals()
        schemas.register()
        job_id = os.environ.get("SLURM_JOB_ID", str(number))
        cfg = _composed(self.context, self.config, overrides, number, job_id)
        folder = Path(cfg.hydra.sweep.dir) / str(cfg.hydra.sweep.subdir)
        if (folder / RUN_FILE).exists():  # its cluster has started it again
            overrides = [*overrides, override("resume", folder)]
            cfg = _composed(self.context, self.config, overrides, number, job_id)
        return run_job(
            hydra_context=self.context,
            task_function=self.task_function,
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def checkpoint(self, overrides: Sequence[str], number: int) -> Any:
        """What submitit queues when Slurm is about to stop the run: the same once more."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, overrides, number)


class _Processes(Launcher):
    """What launchers with a process per run have in common."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keeps what the processes of the runs need."""
        self._context = hydra_context
        self._task_function = task_function
        self._config = config

    def _run(self) -> _Run:
        Path(self._config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        return _Run(
            self._context, self._config, self._task_function, Singleton.get_state(), os.getcwd()
        )


class SubmititLauncher(_Processes):
    """Slurm, or processes on this machine, by way of submitit."""

    def __init__(
        self, *, cluster: str, submitit_folder: str, array_parallelism: int | None, **settings: Any
    ) -> None:
        """Takes the settings of `conf/hydra/launcher/submitit_*.yaml`.

        Args:
            cluster: `slurm`, or `local` for processes on this machine.
            submitit_folder: Where the logs of the processes go.
            array_parallelism: Runs at once; None means one per core on this machine, and as many
                as Slurm gives.
            settings: Of submitit, without the name of the cluster.
        """
        self._cluster = cluster
        self._folder = submitit_folder
        self._parallel = array_parallelism
        self._settings = settings

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """The results in the order of the runs, when all have ended."""
        submitit = _imported("submitit")
        executor = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
        settings = {
            name if name in SHARED else f"{self._cluster}_{name}": _plain(value)
            for name, value in self._settings.items()
            if value is not None
        }
        run = self._run()
        overrides = [list(words) for words in job_overrides]
        numbers = range(initial_job_idx, initial_job_idx + len(overrides))
        if self._cluster == "slurm":
            if self._parallel is not None:
                settings["slurm_array_parallelism"] = self._parallel
            executor.update_parameters(**settings)
            jobs = executor.map_array(run, overrides, numbers)
        else:
            executor.update_parameters(**settings)
            limit = self._parallel or len(os.sched_getaffinity(0))
            jobs = []
            for words, number in zip(overrides, numbers, strict=True):
                while sum(not job.done() for job in jobs) >= limit:
                    time.sleep(POLL_S)
                jobs.append(executor.submit(run, words, number))
        return [
            _waited(job.result, submitit.core.utils.UncompletedJobError, words, job.paths.stderr)
            for job, words in zip(jobs, overrides, strict=True)
        ]


class RayLauncher(_Processes):
    """A Ray cluster, or Ray on this machine."""

    def __init__(self, *, init: DictConfig, remote: DictConfig) -> None:
        """Takes the settings of `conf/hydra/launcher/ray.yaml`.

        Args:
            init: Of `ray.init`.
            remote: What each run asks for: options of `ray.remote`.
        """
        self._init = init
        self._remote = remote

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """The results in the order of the runs, when all have ended."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray = _imported("ray")
        ray.init(**_plain(self._init))
        try:
            run = ray.put(self._run())
            execute = ray.remote(**_plain(self._remote))(_execute)
            waiting = [
                (execute.remote(run, list(words), number), words)
                for number, words in enumerate(job_overrides, initial_job_idx)
            ]
            return [
                _waited(lambda job=job: ray.get(job), ray.exceptions.RayError, words)  # type: ignore[misc]
                for job, words in waiting
            ]
        finally:
            ray.shutdown()


PLUGINS = (GridSweeper, RayLauncher, SubmititLauncher)


def _execute(run: _Run, overrides: Sequence[str], number: int) -> JobReturn:
    return run(overrides, number)


def _composed(
    context: HydraContext,
    config: DictConfig,
    overrides: Sequence[str],
    number: int,
    job_id: str,
) -> DictConfig:
    """The configuration of one run, with Hydra's `job.num` and `job.id`."""
    cfg = context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(cfg):
        cfg.hydra.job.num = number
        cfg.hydra.job.id = job_id
    HydraConfig.instance().set_config(cfg)
    return cfg


def _waited(
    result: Callable[[], JobReturn],
    death: type[Exception],
    overrides: Sequence[str],
    log: Path | str = "",
) -> JobReturn:
    """The result of a run; a failed one where its process has died."""
    try:
        done = result()
    except death:
        done = _lost(overrides)
    if done.status is not JobStatus.COMPLETED:
        done._return_value.log = str(log)
    return done


def _lost(overrides: Sequence[str]) -> JobReturn:
    return JobReturn(
        overrides=list(overrides), status=JobStatus.FAILED, _return_value=RunFailed("")
    )


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ConfigError(
            f"This launcher needs the package {name!r}: {error}. "
            "Install it: pip install -e '.[cluster]' -c constraints.txt"
        ) from error


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
