"""`python -m sia.tasks list | fetch NAME | split NAME --seed N | check NAME`.

`--source S` takes one of the further sources that the task names.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from sia.errors import SiaError, TaskError
from sia.tasks import Task, checks, data, find_task_dir, load_task


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sia.tasks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all bundled tasks and whether their data are here")
    for name, text in (
        ("fetch", "get the raw data, checked by hash (DVC stage fetch@NAME)"),
        ("split", "make the public and private sides (DVC stage split@NAME)"),
        ("check", "run the oracle, the null control and the leak walk"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("task", help="name of a folder in tasks/, or a path")
        command.add_argument("--source", help="a further source of its task.yaml, not its own data")
        if name == "split":
            command.add_argument("--seed", type=int, required=True)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code


def _run(args: argparse.Namespace) -> int:
    if args.command == "list":
        for folder in sorted(find_task_dir("tasks").iterdir()):
            if (folder / "task.yaml").is_file():
                own = load_task(folder)
                for task in (own, *(load_task(folder, name) for name in own.facts.sources)):
                    state = "ready" if task.has_data() else "no data"
                    print(f"{task.name:22} {state:8} {task.facts.title}")
        return 0
    task = load_task(_folder(args.task), args.source)
    if args.command == "fetch":
        console = Console(stderr=True)
        print(f"raw data of {task.name}: {data.fetch(task, console=console)}")
    elif args.command == "split":
        data.split(task, seed=args.seed)
        print(f"splits of {task.name}: {task.data_dir}")
    else:
        return _check(task)
    return 0


def _folder(name: str) -> Path:
    return find_task_dir(name if "/" in name else f"tasks/{name}")


def _check(task: Task) -> int:
    task.check_needs()
    if not task.has_data():
        raise TaskError(
            f"The data of task {task.name!r} are not here. "
            f"Get them: dvc repro {task.stage('split')}"
        )
    faults = [*checks.controls(task), *checks.leaks(task)]
    for fault in faults:
        print(f"fault: {fault}")
    print(f"{task.name}: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
