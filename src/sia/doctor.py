"""`python -m sia.doctor [group=option ...]`: is everything there that such a run needs?

Takes the overrides of `python -m sia`, composes the same configuration, and looks at everything
that a run would meet before it spends time or money. Exit code 0, or 2 if anything is missing.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.text import Text

from sia import advice, build
from sia.compose import Composed, composed, providers
from sia.config import Config
from sia.errors import SiaError
from sia.gateway.provider import Provider
from sia.sandbox.environments import REQUIREMENTS
from sia.tasks import Task
from sia.tracking.location import child_environment, locate

PACKAGE = "sia-framework"
ENDPOINT_S = 5.0
ASK_S = 120.0  # of a program that is asked something
GIB = 2**30
MIB = 2**20
OK, WARN, FAIL = "ok", "warn", "FAIL"
STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check has found.

    Attributes:
        state: `ok`, `warn` (a run starts, and something may go wrong) or `FAIL` (it does not).
        value: What is there. Never a key.
        help: What to do; empty where nothing is to be done.
    """

    name: str
    state: str
    value: str
    help: str = ""


Check = Callable[[], Iterator[Finding]]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(words):
        print(f"{__doc__}\nUsage: python -m sia.doctor [--offline] [-cd folder] [key=value ...]")
        return 0
    console = Console()
    found: list[Finding] = []
    for one in examine(words, offline="--offline" in words):
        found.append(one)
        _show(console, one)
    return _sum_up(console, found)


def examine(argv: Sequence[str], *, offline: bool) -> Iterator[Finding]:
    """Makes every check, one after the other; none keeps the others from being made.

    Args:
        argv: Overrides of a run, as on the command line.
        offline: Leave out what needs a network.
    """
    yield from _guarded("python", _python)
    yield from _guarded("packages", _packages)
    words, launcher = _without_launcher(argv)
    if launcher:
        yield from _guarded("launcher", lambda: _launcher(launcher))
    try:
        found = composed(words)
    except SiaError as error:
        yield Finding(name="configuration", state=FAIL, value=str(error))
        return
    cfg = found.cfg
    chosen = ", ".join(f"{group}={found.choices[group]}" for group in ("task", "meta", "target"))
    yield Finding(name="configuration", state=OK, value=chosen)
    checks: list[tuple[str, Check]] = [
        ("budget", lambda: _budget(cfg)),
        ("disk", lambda: _disk(found)),
        ("agent", lambda: _agent(cfg)),
        ("provider", lambda: _providers(cfg, offline=offline)),
        ("tracking", lambda: _tracking(cfg, found, offline=offline)),
    ]
    try:
        checked = build.check(cfg)
    except SiaError as error:
        yield Finding(name="values", state=FAIL, value=str(error))
    else:
        checks[2:2] = [
            ("memory", lambda: _memory(cfg, checked.task)),
            ("data", lambda: _data(checked.task)),
            ("sandbox", lambda: _sandbox(checked)),
            ("environments", lambda: _environments(cfg, checked.first_harness)),
        ]
    for name, check in checks:
        yield from _guarded(name, check)


def _guarded(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check; one more if it breaks, so that the others are still made."""
    try:
        yield from check()
    except SiaError as error:
        yield Finding(name=name, state=FAIL, value=str(error))
    except Exception as error:  # shown like any other finding, and it fails the doctor
        yield Finding(
            name=name, state=FAIL, value=f"could not be checked: {type(error).__name__}: {error}"
        )


def _python() -> Iterator[Finding]:
    needed = metadata.metadata(PACKAGE)["Requires-Python"] or ""
    version = platform.python_version()
    fits = SpecifierSet(needed).contains(version, prereleases=True)
    help = "" if fits else f"Install a Python {needed} and make an environment with it."
    yield Finding(
        name="python", state=OK if fits else FAIL, value=f"{version}, {sys.executable}", help=help
    )


def _packages() -> Iterator[Finding]:
    """What is installed against what was tested: base packages, and extras as far as they are."""
    wrong, extras = [], set()
    for text in metadata.requires(PACKAGE) or []:
        needed = Requirement(text)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(needed.marker or ""))
        if needed.marker and not needed.marker.evaluate({"extra": extra[1] if extra else ""}):
            continue
        version = _version(needed.name)
        if version is None:
            if extra is None:
                wrong.append(f"{needed.name} is missing")
        elif not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} {version} is not {needed.specifier}")
        elif extra is not None:
            extras.add(extra[1])
    if wrong:
        yield Finding(
            name="packages",
            state=FAIL,
            value="; ".join(wrong),
            help=f"pip install --upgrade {PACKAGE}",
        )
        return
    yield Finding(
        name="packages",
        state=OK,
        value=f"all in their tested ranges; extras: {', '.join(sorted(extras)) or 'none'}",
    )


def _launcher(name: str) -> Iterator[Finding]:
    module = f"hydra_plugins.hydra_{name.split('_')[0]}_launcher"  # `submitit_slurm` as well
    if name == "basic" or importlib.util.find_spec(module) is not None:
        yield Finding(name="launcher", state=OK, value=f"hydra/launcher={name}")
    else:
        yield Finding(
            name="launcher",
            state=FAIL,
            value=f"hydra/launcher={name} is not installed",
            help=f"pip install '{PACKAGE}[cluster]'",
        )


def _budget(cfg: Config) -> Iterator[Finding]:
    budget = cast(DictConfig, cfg.budget)
    limits = [f"{name!s}={value:g}" for name, value in budget.items() if value is not None]
    free = not providers(cfg)
    yield Finding(
        name="budget",
        state=OK if limits or free else WARN,
        value=", ".join(limits) or ("none, and no model is called" if free else "none"),
        help="" if limits or free else "Models cost money. Set a limit: budget.usd=5",
    )


def _disk(found: Composed) -> Iterator[Finding]:
    folder = _existing(found.folder.absolute())
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    free = shutil.disk_usage(folder).free
    most = found.cfg.workers * found.cfg.sandbox.limits.disk_mib * MIB
    yield Finding(
        name="disk",
        state=OK if free > 2 * most else WARN if free > most else FAIL,
        value=f"{free / GIB:.1f} GiB free for {found.folder}, of which attempts may use "
        f"{most / GIB:.1f}",
        help=""
        if free > 2 * most
        else "Free some space, or choose another folder: hydra.run.dir=/big/run",
    )


def _memory(cfg: Config, task: Task) -> Iterator[Finding]:
    limit = cfg.sandbox.limits.memory_mib or task.facts.limits.memory_mib
    most = cfg.workers * limit
    free = _available_mib()
    enough = free is None or free > most
    yield Finding(
        name="memory",
        state=OK if enough else WARN,
        value=f"{'?' if free is None else free} MiB free; {cfg.workers} attempts side by side may "
        f"use {most} MiB",
        help="" if enough else "Fewer side by side (workers=1), or sandbox.limits.memory_mib=...",
    )


def _data(task: Task) -> Iterator[Finding]:
    if not task.has_data():
        made = task.facts.source.kind == "generated"
        yield Finding(
            name="data",
            state=OK if made else FAIL,
            value="made by the first run" if made else f"those of {task.name} are not here",
            help="" if made else f"dvc repro {task.stage('split')}",
        )
        return
    changed = _changed_data(task)
    if changed is None:
        yield Finding(
            name="data",
            state=OK,
            value=f"{task.name} v{task.facts.version}; under no version control",
        )
    elif changed:
        yield Finding(
            name="data",
            state=FAIL,
            value=f"not those of dvc.lock: {', '.join(changed)}",
            help=task.restore,
        )
    else:
        yield Finding(
            name="data", state=OK, value=f"{task.name} v{task.facts.version}, as in dvc.lock"
        )


def _sandbox(checked: build.Checked) -> Iterator[Finding]:
    """Really runs something in it; and whether the data can be shown to a target at all."""
    checked.sandbox.check()
    if checked.task.has_data():
        checked.target.check()
    weak = checked.sandbox.name == "process"
    yield Finding(
        name="sandbox",
        state=WARN if weak else OK,
        value=checked.sandbox.protects,
        help="Let the first program be one you trust, or: apt install bubblewrap" if weak else "",
    )


def _environments(cfg: Config, harness: Path) -> Iterator[Finding]:
    cache = Path(cfg.target.environments or "~/.cache/sia/environments").expanduser()
    folder = _existing(cache)
    writable = os.access(folder, os.W_OK)
    needed = (harness / REQUIREMENTS).is_file()
    yield Finding(
        name="environments",
        state=OK if writable else FAIL if needed else WARN,
        value=f"{cache} {'can' if writable else 'cannot'} be written",
        help="" if writable else "Choose a folder: target.environments=/big/environments",
    )


def _agent(cfg: Config) -> Iterator[Finding]:
    """The interpreter of the agent's SDK, really asked to import it."""
    agent = build.part(cfg.meta, cfg.trusted_packages)
    if not hasattr(agent, "runtime"):
        return
    runtime = agent.runtime()
    package = str(agent.package)
    program = f"import {package}, platform; print(platform.python_version())"
    try:
        done = subprocess.run(
            [str(runtime.python), "-I", "-c", program],
            capture_output=True, text=True, timeout=ASK_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(name="agent", state=FAIL, value=f"{runtime.python}: {error}")
        return
    if done.returncode == 0:
        value = f"{package} in Python {done.stdout.strip()}, {runtime.python}"
        yield Finding(name="agent", state=OK, value=value)
    else:
        reason = (done.stderr.strip().splitlines() or ["it fails"])[-1]
        yield Finding(
            name="agent",
            state=FAIL,
            value=f"{package} cannot be imported in {runtime.python}: {reason}",
            help=str(agent.install),
        )


def _providers(cfg: Config, *, offline: bool) -> Iterator[Finding]:
    """Keys, endpoints, models and prices of everybody who is asked."""
    routes = providers(cfg)
    if cfg.gateway.mode == "replay" and routes:
        there = cfg.gateway.recording is not None and Path(cfg.gateway.recording).exists()
        yield Finding(
            name="recording",
            state=OK if there else FAIL,
            value=f"{cfg.gateway.recording} answers; no key, no network",
            help="" if there else "Give a recorded run: gateway.recording=runs/...",
        )
        return
    asked: dict[tuple[str, str], tuple[Provider, list[str]]] = {}
    for provider, model in routes.values():
        place = asked.setdefault((provider.name, provider.base_url), (provider, []))
        place[1].extend([model] if model not in place[1] else [])
    for provider, models in asked.values():
        key, finding = _key(provider)
        yield finding
        yield from _prices(cfg, provider, models)
        if not offline and finding.state != FAIL:
            yield from _endpoints(provider, key, models)
    for local in dict.fromkeys(build.local_models(cfg, Path()).values()):
        name = f"model {local.model}"
        try:
            local.check()
        except SiaError as error:
            yield Finding(name=name, state=FAIL, value=str(error))
        else:
            yield Finding(name=name, state=OK, value="on this machine; the run serves it")


def _key(provider: Provider) -> tuple[str, Finding]:
    """The key, and a finding that does not show it."""
    name = f"key of {provider.name}"
    if not provider.api_key_env:
        return "", Finding(name=name, state=OK, value="none is needed")
    try:
        key = provider.key()
    except SiaError as error:
        return "", Finding(name=name, state=FAIL, value=str(error))
    size = "of usual length" if len(key) >= 20 else "short: is it whole?"
    state = OK if len(key) >= 20 else WARN
    return key, Finding(name=name, state=state, value=f"${provider.api_key_env} is set, {size}")


def _prices(cfg: Config, provider: Provider, models: Sequence[str]) -> Iterator[Finding]:
    own = cfg.target.provider
    node = "target.provider" if own and own.name == provider.name else "provider"
    for model in models:
        if provider.price(model) is not None:
            as_of = f", as of {provider.prices_as_of}" if provider.prices_as_of else ""
            yield Finding(name=f"price of {model}", state=OK, value=f"known{as_of}")
        else:
            needed = cfg.budget.usd is not None
            yield Finding(
                name=f"price of {model}",
                state=FAIL if needed else WARN,
                value="unknown" + (", and budget.usd needs it" if needed else ""),
                help="Give it, in USD per million tokens: "
                f"'+{node}.prices={{{model}: {{input: 1, output: 2}}}}'",
            )


def _endpoints(provider: Provider, key: str, models: Sequence[str]) -> Iterator[Finding]:
    """Asks for the list of models: free everywhere, and it needs address and key."""
    asked: dict[str, tuple[str, dict[str, str]]] = {}  # by URL: some speak both at one address
    if set(provider.formats) - {"messages"}:
        url = f"{provider.base_url.rstrip('/')}/models"
        asked[url] = provider.base_url, {"authorization": f"Bearer {key}"} if key else {}
    if "messages" in provider.formats:
        url = f"{provider.anthropic_url.rstrip('/')}/v1/models"
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01"} if key else {}
        asked[url] = provider.anthropic_url, headers
    unknown = list(models)
    for url, (address, headers) in asked.items():
        name = f"endpoint of {provider.name}"
        if address.startswith("unix:"):
            yield Finding(name=name, state=OK, value=f"{address}, a socket; not asked")
            continue
        shown = _without_password(address)
        status, body, problem = _get(url, headers)
        if problem:
            help = f"Is the address right, the server up, a proxy needed? curl {shown}"
            yield Finding(name=name, state=FAIL, value=f"{shown}: {problem}", help=help)
        elif status in (401, 403):
            yield Finding(
                name=name,
                state=FAIL,
                value=f"{shown} refuses the key ({status})",
                help=f"Set a valid one: export {provider.api_key_env or 'YOUR_KEY'}=...",
            )
        elif status in (404, 405):
            value = f"{shown} answers, but lists no models ({status}): they cannot be checked"
            yield Finding(name=name, state=WARN, value=value)
        elif status != 200:
            value = f"{shown} answers {status}"
            help = "Ask the provider's status page, then try again." if status >= 500 else ""
            yield Finding(name=name, state=WARN, value=value, help=help)
        else:
            yield Finding(name=name, state=OK, value=f"{shown} accepts the request")
            yield from _models(_listed(body), unknown)
            unknown = []  # one list is enough


def _models(listed: Sequence[str], models: Sequence[str]) -> Iterator[Finding]:
    """Whether the provider offers what is wanted. Lists may be cut off: a doubt, no verdict."""
    known = {name.removeprefix("models/") for name in listed}
    for model in models if known else ():
        there = model in known
        yield Finding(
            name=f"model {model}",
            state=OK if there else WARN,
            value="offered" if there else f"not among the {len(known)} models that are listed",
            help="" if there else advice.nearest(model, known).strip(),
        )


def _tracking(cfg: Config, found: Composed, *, offline: bool) -> Iterator[Finding]:
    if found.choices.get("tracking") != "mlflow":
        return
    node = cast(DictConfig, cfg.tracking)
    location = locate(option=OmegaConf.select(node, "uri"))
    if location.database is None and offline:
        return
    if location.database is not None and not os.access(
        _existing(location.database.parent), os.W_OK
    ):
        yield Finding(
            name="tracking",
            state=WARN,
            value=f"{location.database.parent} cannot be written",
            help="Choose a place: tracking.uri=sqlite:////tmp/mlflow.db, or tracking=none",
        )
        return
    done = subprocess.run(
        [sys.executable, "-m", "sia.tracking", "check"],
        capture_output=True, text=True, timeout=ASK_S, check=False,
        env=child_environment(location),
    )  # fmt: skip
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["?"]
    yield Finding(  # a run goes on without its mirror
        name="tracking",
        state=OK if done.returncode == 0 else WARN,
        value=lines[-1].removeprefix("sia: "),
        help="" if done.returncode == 0 else "The run itself needs no mirror: tracking=none",
    )


def _get(url: str, headers: Mapping[str, str]) -> tuple[int, bytes, str]:
    """Status, body, and why there is none of both."""
    import httpx2

    try:
        answer = httpx2.get(url, headers=dict(headers), timeout=ENDPOINT_S)
    except httpx2.TimeoutException:
        return 0, b"", f"no answer within {ENDPOINT_S:g} s"
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return 0, b"", f"cannot be reached ({error})"
    return answer.status_code, answer.content, ""


def _listed(body: bytes) -> list[str]:
    """Ids of an answer to a question for models, of any vendor."""
    try:
        data = json.loads(body)
    except ValueError:
        return []
    entries: Any = data.get("data", data.get("models")) if isinstance(data, dict) else data
    if not isinstance(entries, list):
        return []
    names = [e.get("id") or e.get("name") for e in entries if isinstance(e, dict)]
    return [name for name in names if isinstance(name, str)]


def _changed_data(task: Task) -> list[str] | None:
    """Outputs of a task's stages that are not as recorded; None where nothing is recorded."""
    top = task.root.parents[1]
    if not ((top if task.source is None else task.root) / "dvc.lock").is_file():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", task.stage("split")],
        cwd=top, capture_output=True, text=True, timeout=ASK_S, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return None  # a task of one's own is in no stage
    changed: list[str] = []
    for entries in json.loads(done.stdout or "{}").values():
        for entry in entries:
            outs = entry.get("changed outs", {}) if isinstance(entry, dict) else {}
            changed += [name for name, state in outs.items() if state != "not in cache"]
    return changed


def _without_launcher(argv: Sequence[str]) -> tuple[list[str], str]:
    """The command line without `hydra/launcher=`: a missing launcher hides all other findings."""
    found = [word.partition("=")[2] for word in argv if word.startswith("hydra/launcher=")]
    words = [word for word in argv if not word.startswith("hydra/launcher=")]
    return words, found[-1] if found else ""


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}").geturl()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _available_mib() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text("ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) // 1024 if found else None


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _show(console: Console, one: Finding) -> None:
    line = Text(f"{one.state:5}", style=STYLES[one.state])
    line.append(f"{one.name}: ", style="bold").append(one.value, style="default")
    if one.help:
        line.append(f"\n     {one.help}", style="default")
    console.print(line, highlight=False, soft_wrap=True)


def _sum_up(console: Console, found: Sequence[Finding]) -> int:
    counts = {state: sum(one.state == state for one in found) for state in STYLES}
    failed = [one.name for one in found if one.state == FAIL]
    console.print(
        f"{counts[OK]} ok, {counts[WARN]} to think about, {counts[FAIL]} to mend"
        + (f": {', '.join(failed)}" if failed else ""),
        markup=False,
        highlight=False,
    )
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
