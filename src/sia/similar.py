"""`python -m sia.similar TASK --count 3 provider=... target.model=...`: tasks like this one.

A model of any configured provider reads the task's `task.md` and describes further tasks of its
kind. They become `SAMPLE_TASK_DESCRIPTIONS.md` on the public side, where a meta backend reads them:
whoever sees several tasks is less tempted to fit a harness to one.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sia import advice, build
from sia.config import Config, register
from sia.errors import BudgetExceeded, ConfigError, ProviderError, SiaError, TaskError
from sia.gateway.protocol import Lease, Role
from sia.rundir import write_atomic
from sia.tasks import find_task_dir
from sia.tasks.external import DESCRIPTIONS

MAX_TOKENS = 4_000
MAX_COUNT = 10
HEADING = re.compile(r"^## \S.*$", re.MULTILINE)
ASK = """\
Below is the description of a machine-learning task. Describe {count} other tasks that ask for the
same skills, each in another domain, with other data and, where it makes sense, another metric. For
each, write a Markdown section that starts with a line `## title` and says what is given, what is
asked for, what is handed in and how it is scored. Write nothing before the first section. Do not
repeat or solve the task itself.

{task}"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sia.similar", description=__doc__)
    parser.add_argument("task", help="name of a folder in tasks/, or a path")
    parser.add_argument("--count", type=int, default=3, help=f"1 to {MAX_COUNT} (default: 3)")
    parser.add_argument("overrides", nargs="*", help="provider=... target.model=... budget.usd=...")
    args = parser.parse_intermixed_args(argv)
    try:
        path = describe(args.task, count=args.count, overrides=args.overrides)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    print(path)
    return 0


def describe(task: str, *, count: int, overrides: list[str]) -> Path:
    """Asks once and writes the descriptions. Returns their file.

    Args:
        task: Name of a folder in tasks/, or a path.
        count: How many tasks are asked for.
        overrides: Of the configuration: who is asked, and what it may cost.

    Raises:
        ConfigError: The count or an override is wrong, or no model is named.
        ProviderError: The provider gives no usable answer.
        TaskError: The task's data are not here.
    """
    if not 1 <= count <= MAX_COUNT:
        raise ConfigError(f"--count {count} must lie between 1 and {MAX_COUNT}.")
    root = find_task_dir(task if "/" in task else f"tasks/{task}")
    public = root / "data" / "public"
    if not (public / "task.md").is_file():
        raise TaskError(f"{public} has no task.md: the data of this task are not on this machine.")
    register()
    try:
        with initialize_config_module("sia.conf", version_base="1.3"):
            cfg = cast(Config, compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(advice.explain(overrides, error)) from error
    if cfg.target.model is None or not (cfg.target.provider or cfg.provider).formats:
        raise ConfigError("Which model is asked? provider=... target.model=...")
    prompt = ASK.format(count=count, task=(public / "task.md").read_text(encoding="utf-8"))
    formats = (cfg.target.provider or cfg.provider).formats
    with (
        tempfile.TemporaryDirectory(prefix="sia-similar-") as folder,
        build.gateway(cfg, Path(folder), (Role.TARGET,)) as gateway,
    ):
        assert gateway is not None  # there is a model
        with gateway.lease(Role.TARGET, "similar") as lease:
            text = _ask(lease, prompt, formats, cfg.gateway.call_s)
    if (found := len(HEADING.findall(text))) < count:
        raise ProviderError(
            f"The model described {found} tasks and not {count}; nothing was written. Its answer "
            f"begins: {text[:200]!r}"
        )
    path = public / DESCRIPTIONS
    write_atomic(path, text[HEADING.search(text).start() :].rstrip().encode() + b"\n")  # type: ignore[union-attr]
    return path


def _ask(lease: Lease, prompt: str, formats: list[str], timeout_s: float) -> str:
    """One exchange in a format that the provider speaks."""
    import httpx2

    endpoint = lease.endpoint
    messages = [{"role": "user", "content": prompt}]
    body = {"model": endpoint.model, "messages": messages, "max_tokens": MAX_TOKENS}
    chat = "chat" in formats
    place = "/v1/chat/completions" if chat else "/v1/messages"
    headers = {"authorization": f"Bearer {endpoint.key}"} if chat else {"x-api-key": endpoint.key}
    try:
        answer = httpx2.post(
            f"http://127.0.0.1:{endpoint.port}{place}",
            json=body, headers=headers, timeout=timeout_s + 10, trust_env=False,
        )  # fmt: skip
    except httpx2.TransportError as error:
        raise ProviderError(f"The model could not be asked: {error}") from error
    if lease.refused:
        raise BudgetExceeded(lease.refused)
    if answer.status_code != 200:
        raise ProviderError(f"The provider answered {answer.status_code}: {answer.text[:300]}")
    try:
        said = answer.json()
        if chat:
            return str(said["choices"][0]["message"]["content"] or "")
        return "".join(part.get("text", "") for part in said["content"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ProviderError(f"The provider's answer cannot be read: {answer.text[:300]}") from error


if __name__ == "__main__":
    sys.exit(main())
