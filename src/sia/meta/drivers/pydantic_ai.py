"""Drives a Pydantic AI agent through one session: `driver.py --dataset_dir D --working_dir W`.

A program of its own that runs inside the sandbox, under another name than the package's. It reads
`job.json` beside itself, works in the working folder, and prints as its last line how the session
ended.

What it asks the model is a function of the job and of what the model and its tools answer. What
still varies: the working folder in answers of tools, where the sandbox has no fixed one
(`sandbox=process`); what commands print (`ls -l` is made to print 2026-01-31 12:34); ids of tool
calls, where the model's server gives none.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from openai import AsyncOpenAI, OpenAIError
from pydantic import Field
from pydantic_ai import Agent, ModelRetry, Tool, UsageLimits
from pydantic_ai.exceptions import AgentRunError, UnexpectedModelBehavior
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import RunUsage

OUTPUT = 20_000  # characters of what a tool answers
LINES = 2_000
READ_MIB = 16  # of a file that is read, edited or searched
COMMAND_S, SEARCH_S = 120, 20
FAILURES = 10  # of one tool in a row, after which the session ends
DETAIL, PROGRESS = 500, 200  # characters of a line


class Model(OpenAIChatModel):
    """A model whose answers are never taken for bugs of this program."""

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """Asks once.

        Raises:
            UnexpectedModelBehavior: The answer cannot be used, or half a character of an earlier
                one cannot be sent back.
            AgentRunError: The server failed.
        """
        try:
            return await super().request(messages, model_settings, model_request_parameters)
        except (LookupError, TypeError, ValueError) as error:  # what the SDK lets through
            raise UnexpectedModelBehavior(
                f"the answer cannot be used: {type(error).__name__}: {error}"
            ) from error


class Workspace:
    """The tools of the agent; what goes wrong in one is told to the model.

    They block: calls of one answer are carried out one after the other, in its order.

    Args:
        work: Where it may write, and where commands run.
        data: Where it may read as well.
    """

    def __init__(self, *, work: Path, data: Path) -> None:
        self._work = work.resolve()
        self._data = data.resolve()

    async def read_file(
        self,
        path: str,
        offset: Annotated[int, Field(ge=1)] = 1,
        limit: Annotated[int, Field(ge=1, le=LINES)] = LINES,
    ) -> str:
        """Reads lines of a text file.

        Args:
            path: Relative to the workspace, or absolute.
            offset: The first line, counted from 1.
            limit: How many lines at most.
        """
        lines = self._bytes(path).decode("utf-8", "replace").split("\n")
        chosen = lines[offset - 1 : offset - 1 + limit]
        shown = "\n".join(chosen)
        if len(shown) > OUTPUT:
            shown = shown[:OUTPUT]
            last = offset + shown.count("\n")
            return f"{shown}\n[cut after {OUTPUT} characters, in line {last} of {len(lines)}]"
        if len(chosen) < len(lines):
            shown += f"\n[lines {offset} to {offset + len(chosen) - 1} of {len(lines)}]"
        return shown

    async def write_file(self, path: str, content: str) -> str:
        """Writes a file of the workspace; makes its folders, replaces what was there.

        Args:
            path: Relative to the workspace, or absolute.
            content: The whole text of the file.
        """
        target = self._inside(path, self._work)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode())
        return f"{path} is written"

    async def edit_file(self, path: str, old: str, new: str) -> str:
        """Replaces one passage of a file of the workspace.

        Args:
            path: Relative to the workspace, or absolute.
            old: The passage as it stands in the file; must occur exactly once.
            new: What takes its place.
        """
        target = self._inside(path, self._work)
        text = self._bytes(path).decode()
        if not old or (count := text.count(old)) == 0:
            raise ValueError(f"`old` does not occur in {path}")
        if count > 1:
            raise ValueError(f"`old` occurs {count} times in {path}; give more of its surroundings")
        target.write_bytes(text.replace(old, new).encode())
        return f"{path} is edited"

    async def list_files(self, path: str = ".") -> str:
        """Lists the files in a folder and all folders below it, with their sizes in bytes.

        Args:
            path: Relative to the workspace, or absolute.
        """
        root = self._inside(path, self._work, self._data)
        if not root.is_dir():
            raise ValueError(f"{path} is not a folder")
        return joined(f"{file.relative_to(root)} {file.lstat().st_size}" for file in below(root))

    async def search(self, pattern: str, path: str = ".") -> str:
        """Finds lines of text files.

        Args:
            pattern: A regular expression of Python's.
            path: A file or a folder, relative to the workspace, or absolute.
        """
        root = self._inside(path, self._work, self._data)
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        with deadline(SEARCH_S):
            return joined(self._found(expression, root))

    async def run(
        self, command: str, timeout_s: Annotated[int, Field(ge=1, le=COMMAND_S)] = COMMAND_S
    ) -> str:
        """Runs a shell command in the workspace and gives what it printed, with its exit code.

        Everything it has started is ended with it.

        Args:
            command: For `sh -c`.
            timeout_s: Seconds after which it is killed.
        """
        output = Output()
        exit_code = execute(["sh", "-c", command], self._work, timeout_s, output)
        if exit_code is None:
            return f"{output.text()}[killed after {timeout_s} s]"
        return f"{output.text()}[exit code {exit_code}]"

    def tools(self) -> list[Tool[object]]:
        """For `Agent`."""
        return [
            Tool(told(function))
            for function in (
                self.read_file, self.write_file, self.edit_file, self.list_files, self.search,
                self.run,
            )
        ]  # fmt: skip

    def _found(self, expression: re.Pattern[str], root: Path) -> Iterator[str]:
        """Lines that match, with file and number; binary and huge files are passed over."""
        files = below(root) if root.is_dir() else [root]
        for file in files:
            try:
                text = self._bytes(str(file)).decode()
            except (OSError, ValueError):
                continue
            name = file.relative_to(root) if root.is_dir() else file.name
            for number, line in enumerate(text.split("\n"), 1):
                if expression.search(line):
                    yield f"{name}:{number}: {line[:PROGRESS]}"

    def _inside(self, path: str, *folders: Path) -> Path:
        """`path` without links and dots.

        Raises:
            ValueError: It lies in none of `folders`.
        """
        found = (self._work / path).resolve()
        if not any(found.is_relative_to(folder) for folder in folders):
            raise ValueError(f"{path} lies outside of {' and '.join(map(str, folders))}")
        return found

    def _bytes(self, path: str) -> bytes:
        file = self._inside(path, self._work, self._data)
        if file.exists() and not file.is_file():
            raise ValueError(f"{path} is not a file")
        if (size := file.stat().st_size) > READ_MIB * 2**20:
            raise ValueError(f"{path} has {size} bytes, more than {READ_MIB} MiB; use `run`")
        return file.read_bytes()


class Output:
    """The first and the last bytes of a stream."""

    def __init__(self) -> None:
        self._head, self._tail, self._total = bytearray(), bytearray(), 0

    def add(self, chunk: bytes) -> None:
        """Takes the next bytes."""
        self._total += len(chunk)
        room = OUTPUT // 2 - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        del self._tail[: -OUTPUT // 2]

    def text(self) -> str:
        """What was kept, with a line that says how much was not; ends with a line break."""
        dropped = self._total - len(self._head) - len(self._tail)
        middle = f"\n[{dropped} bytes were cut]\n".encode() if dropped else b""
        text = (self._head + middle + self._tail).decode("utf-8", "replace")
        return text if not text or text.endswith("\n") else text + "\n"


def execute(argv: list[str], work: Path, timeout_s: float, output: Output) -> int | None:
    """Runs a command with all that it starts; its exit code, None when it was killed."""
    until = time.monotonic() + timeout_s
    process = subprocess.Popen(
        argv,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "TIME_STYLE": "long-iso"},
    )
    assert process.stdout is not None
    stream = process.stdout.fileno()
    os.set_blocking(stream, False)
    pidfd = os.pidfd_open(process.pid)
    ended = False
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        selector.register(pidfd, selectors.EVENT_READ)
        while not ended and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fd == pidfd:
                    ended = True
                elif chunk := os.read(stream, 2**16):
                    output.add(chunk)
                else:
                    selector.unregister(stream)
    os.killpg(process.pid, signal.SIGKILL)  # not reaped yet: the id is still the command's
    code = process.wait()
    os.close(pidfd)
    until = time.monotonic() + 1  # whoever has left the group may print for ever
    with contextlib.suppress(BlockingIOError):
        while time.monotonic() < until and (chunk := os.read(stream, 2**16)):
            output.add(chunk)
    process.stdout.close()
    return code if ended else None


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Ends what takes longer, a regular expression too; for the main thread.

    Raises:
        TimeoutError: It took longer.
    """

    def stop(_number: int, _frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def told(function: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
    """The tool, its failures as messages to the model."""

    @functools.wraps(function)
    async def tool(*args: Any, **kwargs: Any) -> str:
        try:
            return await function(*args, **kwargs)
        except (OSError, ValueError) as error:
            raise ModelRetry(str(error)) from error

    return tool


def below(root: Path) -> Iterator[Path]:
    """All files below a folder in a fixed order; links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def joined(lines: Iterator[str]) -> str:
    """The lines, as many as fit."""
    shown = ""
    for count, line in enumerate(lines):
        if len(shown) + len(line) >= OUTPUT:
            return f"{shown}[cut after {count} lines; there are more]"
        shown += line + "\n"
    return shown or "[none]"


def report(answer: ModelResponse) -> None:
    """Prints what the model says and does, a line each."""
    for part in answer.parts:
        if isinstance(part, TextPart):
            print(one_line(part.content, PROGRESS))
        elif isinstance(part, ToolCallPart):
            print(one_line(f"{part.tool_name} {part.args_as_json_str()}", PROGRESS))


def one_line(text: str, most: int) -> str:
    """`text` without line breaks, cut to `most` characters."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= most else line[: most - 3] + "..."


async def converse(job: dict[str, Any], workspace: Workspace, usage: RunUsage) -> tuple[str, str]:
    """Runs the session; how it ended, and the detail. Counts in `usage`.

    Raises:
        AgentRunError: The model's server failed or answers what cannot be used.
    """
    client = AsyncOpenAI(max_retries=0)  # the gateway makes second attempts
    model = Model(job["model"], provider=OpenAIProvider(openai_client=client))
    agent = Agent(
        model,
        output_type=[str, type(None)],  # many a model ends without a word
        instructions=job["system"],
        tools=workspace.tools(),
        retries={"tools": FAILURES, "output": 1},
    )
    unlimited = UsageLimits(request_limit=None)
    async with agent.iter(job["prompt"], usage=usage, usage_limits=unlimited) as run:
        async for node in run:
            if Agent.is_call_tools_node(node):
                report(node.model_response)
            elif Agent.is_model_request_node(node):
                # Here, and not by UsageLimits: tools that the last answer calls are carried out.
                if usage.requests >= job["max_turns"]:
                    return "turns", f"max_turns={job['max_turns']} reached"
                if job["max_tokens"] is not None and usage.output_tokens >= job["max_tokens"]:
                    return "tokens", (
                        f"max_tokens={job['max_tokens']} reached: {usage.output_tokens} generated"
                    )
    return "done", (run.result.output or "") if run.result else ""


def main() -> None:
    """Runs the session and prints its ending."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    job = json.loads(Path(__file__).with_name("job.json").read_text("utf-8"))
    usage = RunUsage()
    workspace = Workspace(work=args.working_dir, data=args.dataset_dir)
    try:
        end, detail = asyncio.run(converse(job, workspace, usage))
    except (AgentRunError, OpenAIError) as error:
        end, detail = "error", f"{type(error).__name__}: {error}"
    print(json.dumps({"end": end, "detail": one_line(detail, DETAIL), "turns": usage.requests}))


if __name__ == "__main__":
    main()
