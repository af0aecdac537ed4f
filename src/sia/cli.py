"""`python -m sia`: configuration -> parts -> loop, and the exit code.

0    the run ended with at least one score
1    the run ended without any scored attempt; some runs of a grid did not finish
2    a mistake that the user can mend; nothing half-written
130  interrupted; everything finished is written
"""

import errno
import os
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sia.errors import SiaError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point of `python -m sia` and of Hydra's multirun jobs."""
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        from sia import help

        print(help.text())
        return
    if "--dry-run" in argv:
        _dry_run(argv)
        return
    # Hydra would shorten the traceback and exit with 1 whatever happened; this hands errors to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from sia import config

    config.register()
    # Its scan of plugins executes their modules anew, so ours, which Hydra finds in a wheel but not
    # in a checkout, may be imported only afterwards.
    plugins = Plugins.instance()
    from hydra_plugins import sia_multirun

    for plugin in sia_multirun.PLUGINS:
        plugins.register(plugin)
    sia_multirun.replace_others()

    @hydra.main(version_base="1.3", config_path="pkg://sia.conf", config_name="config")
    def job(cfg: DictConfig) -> float | None:
        return _job(cfg)

    # Hydra only warns of a folder that is not there, and then knows none of its options.
    warnings.filterwarnings("error", message="provider=.* is not available")
    try:
        job()
    except SiaError as error:
        _fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException, UserWarning) as error:
        from sia import advice

        _fail(advice.explain(argv, error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except ValueError as error:
        if "Config group override" not in str(error):  # `experiment=null`
            raise
        from sia import advice

        _fail(advice.explain(argv, error), 2)
    except OSError as error:
        from sia.rundir import DISK_ERRORS, write_error

        # Hydra makes the run directory before it calls us.
        if error.errno not in (*DISK_ERRORS, errno.EACCES) or error.filename is None:
            raise
        _fail(str(write_error(Path(error.filename), error)), 2)


def _dry_run(argv: list[str]) -> None:
    from rich.console import Console

    from sia.estimate import dry_run

    try:
        dry_run(argv, Console())
    except SiaError as error:
        _fail(str(error), error.exit_code)


def _job(cfg: "DictConfig") -> float | None:
    """One run; in a multirun an error is raised, so that the other runs go on."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sia.multirun import RunFailed
    from sia.session import run

    hydra_cfg = HydraConfig.get()
    multirun = hydra_cfg.mode == RunMode.MULTIRUN
    try:
        result = run(
            cfg,
            path=Path(hydra_cfg.runtime.output_dir),
            choices=dict(hydra_cfg.runtime.choices),
            overrides=list(hydra_cfg.overrides.task),
        )
    except SiaError as error:
        with suppress(OSError):  # Hydra makes the folder before it calls us; an empty one goes
            Path(hydra_cfg.runtime.output_dir).rmdir()
        if multirun:
            raise
        _fail(str(error), error.exit_code)
    except Exception as error:
        if not multirun:
            raise
        # What was raised may not survive the way to the grid's process; its traceback never does.
        traceback.print_exc()
        raise RunFailed(f"{type(error).__name__}: {error}") from None
    if result.status == "interrupted":
        sys.exit(130)
    return result.best_score


def _fail(message: str, code: int) -> NoReturn:
    print(f"sia: {message}", file=sys.stderr)
    sys.exit(code)
