"""`python -m sia.pipeline config|run|table`: the cells of a paper.

    config FILE OVERRIDE...   writes what the cell means: its fingerprint
    run RUN OVERRIDE...       makes the cell's run, goes on with it, or finds it finished
    table RECORDS ...         tables and figures of the examined cells TASK-ARM-sSEED

A cell is one configuration with one seed. DVC re-runs a stage when a file that it depends on has
changed; the files in `conf/` change for many reasons that change no run. So a cheap stage composes
the configuration and writes it down without comments, and the dear stage depends on that file.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from sia import build, loop, provenance, rundir
from sia.compose import composed
from sia.config import Config, register
from sia.errors import ConfigError, RunDirectoryError, SiaError
from sia.report import arms as report
from sia.tasks import Task, data
from sia.tasks.task import TaskFacts

CAP = "SIA_MAX_COST_USD"
REPLACED = "replaced"  # beside the runs: those of another meaning that stood in the way
# What changes no record of a run.
SILENT = ("experiment", "resume", "tracking", "web", "workers")
# What task.yaml says to people, and what is known of a task's data by their own hashes.
TOLD = ("title", "published", "report", "warnings", "source", "sources", "baselines", "controls")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; `run` becomes the process of the run itself."""
    parser = argparse.ArgumentParser(
        prog="python -m sia.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, path in (("config", "file"), ("run", "run")):
        sub = commands.add_parser(name)
        sub.add_argument("path", type=Path, metavar=path.upper())
        sub.add_argument("overrides", nargs="+", metavar="OVERRIDE")
    table = commands.add_parser("table")
    table.add_argument("path", type=Path, metavar="RECORDS")
    table.add_argument("--out", type=Path, required=True)
    for name in ("task", "arm", "seed"):
        table.add_argument(f"--{name}", nargs="+", required=True, help="as in params.yaml")
    args = parser.parse_args(argv)
    try:
        if args.command == "table":
            write_tables(args.path, args.out, args.task, args.arm, args.seed)
            return 0
        if args.command == "config":
            args.path.parent.mkdir(parents=True, exist_ok=True)
            rundir.write_atomic(args.path, fingerprint(args.overrides).encode())
            return 0
        arguments = prepare(args.path, args.overrides)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    if arguments is not None:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "sia", *arguments])
    return 0


def fingerprint(overrides: Sequence[str]) -> str:
    """Everything that the records of a cell depend on, but for data and code; YAML, keys sorted.

    The resolved configuration, the version of the loop's protocol, and what `task.yaml` sets. Equal
    texts are cells with the same records.

    Raises:
        ConfigError: The configuration cannot be composed, or a value is out of range.
    """
    cfg = composed(overrides).cfg
    facts = build.check(cfg).task.facts
    meaning = {"protocol": loop.PROTOCOL, "config": _meaning(cfg), "task": _meaning_of_task(facts)}
    return yaml.safe_dump(meaning, allow_unicode=True, sort_keys=True)


def prepare(run: Path, overrides: Sequence[str]) -> list[str] | None:
    """Makes way for the run of a cell.

    A run of another meaning that lies there is moved aside, never removed. One that was killed is
    gone on with. One that was ended by its cap of cost goes on where that was raised. An option
    that came after the run, and has its default value, is no other meaning.

    Args:
        run: Where the run is, or is to be.
        overrides: Of the cell.

    Returns:
        The arguments of `python -m sia`; None where the run has finished already.

    Raises:
        ConfigError: The configuration cannot be composed, or it asks a paid model without a cap.
        RunDirectoryError: The folder in the way is no run.
    """
    cfg = composed(overrides).cfg
    checked = build.check(cfg)
    data.ensure(checked.task, ask=False)
    build.place_harness(cfg, checked)
    cap = _cap(cfg)
    if cap is not None:
        cfg.budget.usd = cap
    capped = [] if cap is None else [f"budget.usd={cap:g}"]
    fresh = [*overrides, *capped, f"hydra.run.dir={run}"]
    if not run.exists() or not any(run.iterdir()):
        return fresh
    if not (run / rundir.RUN_FILE).is_file():
        raise RunDirectoryError(
            f"{run} is in the way: it holds no run. Move it, then repeat: dvc repro"
        )
    recorded = _recorded(run)
    wanted = _meaning(cfg) | {"protocol": loop.PROTOCOL}
    usd = wanted["budget"]["usd"], recorded["budget"]["usd"]
    recorded["budget"]["usd"] = wanted["budget"]["usd"]
    plain = _meaning(composed([]).cfg)
    if not _same(recorded, wanted, plain) or not _same_task(run, checked.task):
        print(f"moved     {run}, a run of another meaning, to {_move_aside(run)}")
        return fresh
    result = rundir.read_result(run)
    if result is not None and result.status == "finished" and usd[0] == usd[1]:
        print(f"finished  {run}")
        return None
    if (run / rundir.EXAM_FILE).is_file():  # its search is over, whatever is asked for now
        print(f"examined  {run}")
        return None
    return [f"resume={run}", *capped]


def write_tables(
    records: Path, out: Path, tasks: Sequence[str], arms: Sequence[str], seeds: Sequence[str]
) -> None:
    """Writes `out`/TASK with tables and figures of the cells, and of no others that lie there.

    Args:
        records: Holds `TASK-ARM-sSEED`, from `python -m sia.exam --records`.
        out: Made anew.
        tasks: Each gets tables of its own.
        arms: In the order of the tables.
        seeds: Of every arm.

    Raises:
        RunDirectoryError: A cell is missing, or cannot be compared with the others.
    """
    named = [
        f"{arm}=" + ",".join(str(records / f"{task}-{arm}-s{k}") for task in tasks for k in seeds)
        for arm in arms
    ]
    made = list(report.reports((), named))
    rundir.remove_tree(out)
    for each in made:
        report.write(each, out / each.task)


def _meaning(cfg: Config) -> dict[str, Any]:
    """The configuration without what changes no record."""
    kept = [str(key) for key in cast(Any, cfg) if key not in SILENT]
    node = OmegaConf.masked_copy(cast(Any, cfg), kept)
    found = cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    found["target"].pop("update_cache", None)  # what is taken over is what would have been made
    if cfg.gateway.mode == "replay":  # nobody is called
        found["provider"] |= dict.fromkeys(("base_url", "anthropic_url", "api_key_env"))
    return found


def _meaning_of_task(facts: TaskFacts) -> dict[str, Any]:
    return {name: value for name, value in asdict(facts).items() if name not in TOLD}


def _recorded(run: Path) -> dict[str, Any]:
    register()
    cfg = cast(Config, OmegaConf.load(run / rundir.CONFIG_FILE))
    return _meaning(cfg) | {"protocol": rundir.read_info(run).protocol}


def _same(recorded: Any, wanted: Any, plain: Any) -> bool:
    """Whether two configurations mean the same; `plain` is that of `python -m sia` alone."""
    if not (isinstance(recorded, dict) and isinstance(wanted, dict)):
        return bool(recorded == wanted)
    defaults = plain if isinstance(plain, dict) else {}
    return recorded.keys() <= wanted.keys() and all(
        _same(recorded[key], value, defaults.get(key))
        if key in recorded
        else key in defaults and value == defaults[key]
        for key, value in wanted.items()
    )


def _same_task(run: Path, task: Task) -> bool:
    info = rundir.read_info(run)
    now = (task.facts.version, provenance.tree_sha256(task.public_dir))
    return (info.task_version, info.provenance.get("public_sha256")) == now


def _move_aside(run: Path) -> Path:
    place = run.parent / REPLACED / f"{run.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    place.parent.mkdir(exist_ok=True)
    return run.rename(place)


def _cap(cfg: Config) -> float | None:
    """What the run may cost where its configuration does not say; None where it need not.

    Raises:
        ConfigError: It may cost something, and nobody says how much.
    """
    paid = [
        f"{role.value}.model={route.model}"
        for role, route in build.routes(cfg).items()
        if route.provider.api_key_env
    ]
    if not paid or cfg.gateway.mode == "replay" or cfg.budget.usd is not None:
        return None
    text = os.environ.get(CAP, "")
    try:
        cap = float(text)
    except ValueError:
        cap = 0.0
    if cap <= 0:
        raise ConfigError(
            f"This cell asks paid models ({', '.join(paid)}) and has no cap of cost "
            f"({CAP}={text!r}). Give each run one: {CAP}=5 dvc repro"
        )
    return cap


if __name__ == "__main__":
    sys.exit(main())
