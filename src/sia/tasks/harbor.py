"""Tasks in the format of Harbor, those that need no container: `task=harbor task.dir=PATH`.

    task.toml        settings
    instruction.md   what is asked
    environment/     Dockerfile, and the files to start with
    tests/           test.sh, or pytest files: they give the reward
    solution/        solve.sh: one way to do it (optional)

A container is needed for what a Dockerfile installs, for services, and for tests that fetch
packages; `obstacles` and `read_dockerfile` say which of these a task has. What remains is run by
`sia.verify.harbor` under bubblewrap, at the paths that the tests expect.
"""

import hashlib
import importlib.util
import json
import posixpath
import re
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sia.errors import TaskError
from sia.provenance import tree_sha256
from sia.tasks.task import ENTRY_POINT, Task, find_task_dir, load_task

STAGING = 1  # counts what makes older staged folders unusable
CACHE = "~/.cache/sia/tasks"
SETTINGS_FILE = "harbor.json"  # beside tests/ in each folder of private labels
START = "environment"  # on the public side: what lies in the working folder at the start
BASES = ("python", "ubuntu", "debian", "bookworm", "scratch")
WITHOUT_EFFECT = ("LABEL", "USER", "CMD", "ENTRYPOINT", "EXPOSE", "ARG", "STOPSIGNAL", "SHELL")
FETCHES = re.compile(r"\b(apt-get|apt|apk|curl|wget|uvx?|pip3?|npm|npx|git clone|conda)\b")
VERIFY = '''"""Runs the tests of the Harbor task that this was staged from."""

from sia.verify.harbor import verify

__all__ = ["verify"]
'''
CONTROLS = '''"""The two ends of the reward: the task's own solution, and nothing done."""

from pathlib import Path

from sia.verify.harbor import solve


def oracle(labels_dir: Path, submission_dir: Path) -> None:
    """Runs solution/solve.sh."""
    solve(labels_dir, submission_dir)


def null(public_dir: Path, submission_dir: Path) -> None:
    """Leaves everything as it is at the start."""
'''
HARNESS = '''"""Leaves everything as it is at the start: the place to begin from."""

import argparse
import shutil
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--dataset_dir", type=Path, required=True)
parser.add_argument("--working_dir", type=Path, required=True)
args = parser.parse_args()
start = args.dataset_dir / "environment"
if start.is_dir():
    shutil.copytree(start, args.working_dir, dirs_exist_ok=True)
'''
CONTRACT = """

## How this task is run here

    python target_agent.py --dataset_dir D --working_dir W

What the task calls `{workdir}` is `W` here: leave there what it asks for. `W` is empty at first;
the files that the task starts with lie in `D/environment`. When the program has ended, those files
are put into a new `{workdir}`, what it left in `W` is laid over them, and the tests are run there.
There is no network, and nothing outside `W` is kept.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tests of a task are run.

    Attributes:
        workdir: Absolute path that the tests know the working folder by.
        script: Whether tests/test.sh is run; else pytest, on the files of tests/.
        env: Variables of the Dockerfile and of `[verifier.env]`.
        timeout_s: Of the tests.
    """

    workdir: str
    script: bool
    env: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a Dockerfile comes to where no container is needed.

    Attributes:
        copies: File or folder of the build context -> path below the working folder.
        obstacles: Lines that a container is needed for.
    """

    workdir: str = "/app"
    env: dict[str, str] = field(default_factory=dict)
    copies: tuple[tuple[str, str], ...] = ()
    obstacles: tuple[str, ...] = ()


def open_harbor(*, dir: str, cache: str | None = None) -> Task:
    """The task that is staged from a Harbor folder; staged now if it is not in the cache.

    Raises:
        TaskError: It is no such folder, or needs a container; each reason is named.
    """
    source = find_task_dir(dir)
    config = _config(source)
    image = read_dockerfile(source / "environment")
    if reasons := [*obstacles(source, config), *image.obstacles]:
        raise TaskError(
            f"{source} needs a container, which task=harbor does not start:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    digest = hashlib.sha256(f"{STAGING}/{tree_sha256(source)}".encode()).hexdigest()
    root = Path(cache or CACHE).expanduser() / f"harbor-{source.name}-{digest[:16]}"
    if not (root / "task.yaml").is_file():
        _stage(source, root, config, image, version=int(digest[:7], 16))
    return load_task(root)


def obstacles(source: Path, config: dict[str, Any]) -> Iterator[str]:
    """What of a task cannot be had without a container, besides its Dockerfile."""
    environment, verifier = config.get("environment", {}), config.get("verifier", {})
    if config.get("steps"):
        yield "[[steps]]: several steps share one container"
    for name in ("docker-compose.yaml", "docker-compose.yml"):
        if (source / "environment" / name).is_file():
            yield f"environment/{name}: services beside the working container"
    for key in ("docker_image", "gpus", "gpu_types", "mcp_servers", "healthcheck"):
        if environment.get(key):
            yield f"environment.{key} = {environment[key]!r}"
    if str(environment.get("os", "linux")).lower() != "linux":
        yield f"environment.os = {environment['os']!r}"
    if verifier.get("environment_mode", "shared") != "shared":
        yield f"verifier.environment_mode = {verifier['environment_mode']!r}"
    for name, value in verifier.get("env", {}).items():
        if "${" in str(value):
            yield f"verifier.env.{name} = {value!r}: the tests ask a service"
    script = source / "tests" / "test.sh"
    if _fetching(script) and not _pytest_files(source):
        line = next(line for line in _commands(script) if FETCHES.search(line))
        yield f"tests/test.sh fetches what it needs: {line.strip()[:80]!r}"


def read_dockerfile(context: Path) -> Image:
    """Working folder, variables and copied files; all else in a Dockerfile is an obstacle."""
    path = context / "Dockerfile"
    if not path.is_file():
        return Image(copies=((".", "."),)) if context.is_dir() else Image()
    workdir = "/app"
    env: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    hindrances: list[str] = []
    bases = 0
    text = re.sub(r"\\\s*\n", " ", path.read_text("utf-8", errors="replace"))
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        word, rest = word.upper(), rest.strip()
        if word == "FROM":
            bases += 1
            base = rest.split()[0].rpartition("/")[2].partition(":")[0].lower()
            if bases > 1 or base not in BASES:
                hindrances.append(f"Dockerfile: {line[:80]}")
        elif word == "WORKDIR":
            workdir = posixpath.normpath(posixpath.join(workdir, rest.strip("\"'")))
        elif word == "ENV":
            env |= _variables(rest)
        elif word in ("COPY", "ADD"):
            found = _copied(rest, workdir)
            if found is None:
                hindrances.append(f"Dockerfile: {line[:80]}")
            else:
                copies += [(source, target) for source, target in found]
        elif word not in WITHOUT_EFFECT and not re.fullmatch(r"RUN\s+mkdir\s[^;&|$`]*", line):
            hindrances.append(f"Dockerfile: {line[:80]}")
    relative = []
    for source, target in copies:
        below = posixpath.relpath(target, workdir)
        if below.startswith(".."):
            hindrances.append(f"Dockerfile: copies {source!r} to {target}, outside {workdir}")
        relative.append((source, below))
    if workdir.split("/")[1] in ("", "usr", "bin", "lib", "etc", "proc", "dev", "tmp", "sia"):
        hindrances.append(f"Dockerfile: WORKDIR {workdir}")
    return Image(workdir=workdir, env=env, copies=tuple(relative), obstacles=tuple(hindrances))


def _config(source: Path) -> dict[str, Any]:
    for name in ("task.toml", "instruction.md", "tests"):
        if not (source / name).exists():
            raise TaskError(f"{source} is no task in the format of Harbor: it has no {name}.")
    try:
        return tomllib.loads((source / "task.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{source / 'task.toml'} cannot be read: {error}") from error


def _stage(source: Path, root: Path, config: dict[str, Any], image: Image, *, version: int) -> None:
    if not (source / "tests" / "test.sh").is_file() and not _pytest_files(source):
        raise TaskError(f"{source / 'tests'} has neither test.sh nor a test_*.py.")
    script = (source / "tests" / "test.sh").is_file() and not _fetching(source / "tests/test.sh")
    if not script and importlib.util.find_spec("pytest") is None:
        raise TaskError(f"{source / 'tests'} needs pytest: pip install pytest")
    verifier, agent = config.get("verifier", {}), config.get("agent", {})
    environment = config.get("environment", {})
    settings = Settings(
        workdir=image.workdir,
        script=script,
        env={**image.env, **{name: str(value) for name, value in verifier.get("env", {}).items()}},
        timeout_s=float(verifier.get("timeout_sec", 600.0)),
    )
    has_solution = (source / "solution" / "solve.sh").is_file()
    instruction = (source / "instruction.md").read_text(encoding="utf-8")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".stage-", dir=root.parent) as folder:
        fresh = Path(folder) / "task"
        public = fresh / "data" / "public"
        (public / START).mkdir(parents=True)
        try:
            for name, target in image.copies:
                _copy_in(source / "environment", name, public / START, target)
            (fresh / "data" / "private").mkdir(mode=0o700)
            for split in ("dev", "test"):
                side = fresh / "data" / "private" / split
                shutil.copytree(source / "tests", side / "tests")
                if has_solution:
                    shutil.copytree(source / "solution", side / "solution")
                (side / SETTINGS_FILE).write_bytes(msgspec.json.encode(settings))
        except (OSError, shutil.Error) as error:
            raise TaskError(f"{source} cannot be staged in {root.parent}: {error}") from error
        text = instruction + CONTRACT.format(workdir=image.workdir)
        for place in (fresh, public):
            (place / "task.md").write_text(text, encoding="utf-8")
        (fresh / "harness").mkdir()
        (fresh / "harness" / ENTRY_POINT).write_text(HARNESS, encoding="utf-8")
        (fresh / "verify.py").write_text(VERIFY, encoding="utf-8")
        if has_solution:
            (fresh / "controls.py").write_text(CONTROLS, encoding="utf-8")
        facts = {
            "name": f"harbor-{source.name}",
            "version": version,
            "title": str(config.get("task", {}).get("description") or source.name)[:120],
            "metric": {"name": "reward", "direction": "maximize", "floor": 0.0, "best": 1.0},
            "submission": {"tree": True, "max_mib": 256},
            "source": {"kind": "folder"},
            "splits": {"dev": 1, "test": 1},
            "limits": {
                "attempt_s": float(agent.get("timeout_sec", 600.0)),
                "verify_s": settings.timeout_s + 60.0,
                "memory_mib": int(environment.get("memory_mb", 4096)),
            },
            "controls": {"oracle": 1.0, "null": 0.0},
            "warnings": list(_warnings(source, script)),
        }
        facts_text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
        (fresh / "task.yaml").write_text(facts_text, encoding="utf-8")
        try:
            fresh.rename(root)
        except OSError:
            if not (root / "task.yaml").is_file():  # else another process was faster
                raise


def _warnings(source: Path, script: bool) -> Iterator[str]:
    yield "Nothing is sealed: a Harbor task is one item, so the exam repeats the dev score."
    yield (
        "Tests that run what the target left share a sandbox with it, as in Harbor: such a program "
        "could write the reward itself."
    )
    if not script and (source / "tests" / "test.sh").is_file():
        yield "tests/test.sh fetches packages: its test_*.py are run by pytest in its place."


def _copy_in(context: Path, name: str, start: Path, target: str) -> None:
    """What `COPY name target` does, for a name that may be a pattern."""
    inside = context.resolve()
    found = sorted(context.glob(name)) if name != "." else [context]
    if not found:
        raise OSError(f"environment/{name} is not there")
    for path in found:
        if not path.resolve().is_relative_to(inside):
            raise OSError(f"environment/{name} leads out of the folder")
        place = start / target
        if path.is_dir():
            leave = shutil.ignore_patterns("Dockerfile", ".dockerignore")
            shutil.copytree(path, place, dirs_exist_ok=True, ignore=leave)
            continue
        if target.endswith("/") or target == "." or place.is_dir():
            place = place / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)


def _copied(rest: str, workdir: str) -> list[tuple[str, str]] | None:
    """Sources and absolute targets of COPY; None for a form that a container is needed for."""
    try:
        words = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
    except ValueError:
        return None
    words = [word for word in words if not word.startswith(("--chown", "--chmod"))]
    if len(words) < 2 or any(
        word.startswith(("--", "http", "git@")) or "$" in word for word in words
    ):
        return None
    *sources, target = words
    folder = target.endswith("/") or len(sources) > 1
    absolute = posixpath.normpath(posixpath.join(workdir, target))
    if folder:
        return [
            (source, posixpath.join(absolute, posixpath.basename(source)))
            if "*" not in source and not source.endswith("/") and source != "."
            else (source, absolute)
            for source in sources
        ]
    return [(sources[0], absolute)]


def _variables(rest: str) -> dict[str, str]:
    try:
        words = shlex.split(rest)
    except ValueError:
        return {}
    if words and "=" not in words[0]:
        return {words[0]: " ".join(words[1:])}
    return dict(word.split("=", 1) for word in words if "=" in word)


def _fetching(script: Path) -> bool:
    return any(FETCHES.search(line) for line in _commands(script))


def _commands(script: Path) -> list[str]:
    if not script.is_file():
        return []
    lines = script.read_text("utf-8", errors="replace").splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def _pytest_files(source: Path) -> list[Path]:
    return sorted((source / "tests").glob("test_*.py"))
