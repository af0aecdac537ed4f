"""Drives the Claude Agent SDK through one session: `claude.py --dataset_dir D --working_dir W`.

A program of its own that runs inside the sandbox. It reads `job.json` beside itself, works in the
working folder, and prints as its last line how the session ended.

What it asks the model is a function of the job and of what the model and its tools answer, so that
a recorded session can be repeated. What still varies, and where:

- today's date: `Today's date is 2026-01-31.` in the first user message;
- the kernel: `OS Version: Linux 6.12.1` in the first user message;
- the working folder, in the first user message and in answers of tools, where the sandbox has no
  fixed one (`sandbox=process`);
- what commands print: dates (`ls -l` is made to print 2026-01-31 12:34), the user id of the
  sandbox, timings, and with `env` a token of the CLI's;
- the name of a temporary file (`x.tmp.6.a8e59098fe58`) in the error of a Write or Edit to a folder
  that cannot be written to;
- where the answer of a Grep is cut that is longer than a megabyte.

Switched off: calls for titles, telemetry, updates, feature flags, memory, reminders, background
commands, and all second attempts at a call (the gateway makes them).

The CLI needs bash at /bin/bash. It brings ripgrep and does without git, /etc and a network.
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKError,
    HookContext,
    HookInput,
    HookMatcher,
    ResultMessage,
    StreamEvent,
    TextBlock,
    ToolUseBlock,
    query,
)
from claude_agent_sdk.types import HookEvent, HookJSONOutput

TOOLS = ["Bash", "Edit", "Glob", "Grep", "Read", "Write"]
# Identities that would be drawn by lot. The session names folders that the model gets to see.
SESSION = "00000000-0000-4000-8000-000000000000"
DEVICE = "0" * 64
COMMAND_MS = 120_000
BUFFER_MIB = 64  # of one message between SDK and CLI
DETAIL, PROGRESS = 500, 200  # characters of a line


def environment(model: str, folder: Path) -> dict[str, str]:
    """What is set for the CLI on top of the sandbox's environment.

    Args:
        model: The only one that may be asked, for side calls as well.
        folder: For the CLI's own files.
    """
    on = (
        "CLAUDE_CODE_DISABLE_ATTACHMENTS",  # reminders, among them of the tokens that are left
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY",
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS",
        "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS",
        "CLAUDE_CODE_DISABLE_FEATURE_FLAGS",
        "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",  # titles, greetings
        "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK",
        "CLAUDE_CODE_DISABLE_TERMINAL_TITLE",
        "DISABLE_AUTOUPDATER",
        "DISABLE_ERROR_REPORTING",
        "DISABLE_TELEMETRY",
    )
    models = (
        "ANTHROPIC_DEFAULT_HAIKU_MODEL",
        "ANTHROPIC_DEFAULT_OPUS_MODEL",
        "ANTHROPIC_DEFAULT_SONNET_MODEL",
        "ANTHROPIC_SMALL_FAST_MODEL",
    )
    return {
        **dict.fromkeys(on, "1"),
        **dict.fromkeys(models, model),
        "BASH_DEFAULT_TIMEOUT_MS": str(COMMAND_MS),
        "BASH_MAX_TIMEOUT_MS": str(COMMAND_MS),
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        # Messages of the role `system`, which other vendors' servers refuse.
        "CLAUDE_CODE_MODEL_CAPABILITIES": "-mid_conv_system",
        "CLAUDE_CODE_TMPDIR": str(folder),
        "CLAUDE_CONFIG_DIR": str(folder),
        "SHELL": "/bin/bash",
        "TIME_STYLE": "long-iso",
    }


class Session:
    """One conversation, its answers counted.

    Attributes:
        turns: Answers of the model.
        tokens: Generated ones.
        spent: The token limit was what ended it.
    """

    def __init__(self, job: dict[str, Any], *, data: Path, work: Path, folder: Path) -> None:
        self.turns = 0
        self.tokens = 0
        self.spent = False
        self._max_tokens: int | None = job["max_tokens"]
        self._answered = asyncio.Condition()
        self._calls: set[str] = set()  # of tools, in answers that are complete
        self._open: set[str] = set()
        self._before = 0  # tokens of earlier answers
        system = folder / "system.md"
        system.write_text(job["system"], encoding="utf-8")  # too long for an argument
        (folder / ".claude.json").write_text(json.dumps({"userID": DEVICE}), encoding="utf-8")
        self._prompt: str = job["prompt"]
        self._options = ClaudeAgentOptions(
            tools=TOOLS,
            allowed_tools=TOOLS,
            permission_mode="dontAsk",  # skipping all permissions is refused to root
            system_prompt={"type": "file", "path": str(system)},
            model=job["model"],
            max_turns=job["max_turns"],
            cwd=work,
            add_dirs=[data],
            setting_sources=[],
            skills=[],
            strict_mcp_config=True,
            verbatim_prompts=True,
            session_id=SESSION,
            include_partial_messages=True,  # the only place that has an answer's usage
            max_buffer_size=BUFFER_MIB * 2**20,
            env=environment(job["model"], folder),
            hooks={
                # An event of the CLI's that the SDK's types do not know of yet.
                cast(HookEvent, "PostToolBatch"): [HookMatcher(hooks=[self._after_tools])],
                "PostToolUse": [HookMatcher(matcher="Bash", hooks=[name_output])],
            },
            stderr=lambda line: print(line, file=sys.stderr),
        )

    async def run(self) -> ResultMessage | None:
        """Runs it to its end; the CLI's account of it, if there was one.

        Raises:
            ClaudeSDKError: The CLI failed without an account.
        """
        result = None
        try:
            async for message in query(prompt=self._prompt, options=self._options):
                if isinstance(message, ResultMessage):
                    result = message
                elif isinstance(message, StreamEvent):
                    await self._count(message.event)
                elif isinstance(message, AssistantMessage):
                    report(message)
        except ClaudeSDKError:
            # After an account of a failure the CLI ends with an exit code that says nothing more.
            if result is None:
                raise
        return result

    async def _count(self, event: dict[str, Any]) -> None:
        """Follows the events of an answer."""
        kind = event.get("type")
        if kind == "message_start":
            self.turns += 1
            self._open.clear()
            self._before = self.tokens
        elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            self._open.add(event["content_block"]["id"])
        elif kind == "message_delta":
            # Of the answer so far; there may be several.
            self.tokens = self._before + event.get("usage", {}).get("output_tokens", 0)
        elif kind == "message_stop":
            async with self._answered:
                self._calls |= self._open
                self._answered.notify_all()

    async def _after_tools(
        self, hook: HookInput, _tool: str | None, _context: HookContext
    ) -> HookJSONOutput:
        """Lets the model be asked again, or not."""
        if self._max_tokens is None:
            return {}
        calls = {call["tool_use_id"] for call in cast(dict[str, Any], hook)["tool_calls"]}
        # Hooks may overtake the events that came before them. The CLI waits a minute for a hook.
        async with self._answered:
            await self._answered.wait_for(lambda: calls <= self._calls)
        self.spent = self.tokens >= self._max_tokens
        return {"continue_": not self.spent}


async def name_output(hook: HookInput, tool: str | None, _context: HookContext) -> HookJSONOutput:
    """Gives the file with a command's long output, which the model gets to see, a fixed name."""
    response = cast(dict[str, Any], hook)["tool_response"]
    if "persistedOutputPath" not in response:
        return {}
    drawn_by_lot = Path(response["persistedOutputPath"])
    named = drawn_by_lot.rename(drawn_by_lot.with_name(f"{tool}.txt"))
    changed = {**response, "persistedOutputPath": str(named)}
    return {"hookSpecificOutput": {"hookEventName": "PostToolUse", "updatedToolOutput": changed}}


def report(message: AssistantMessage) -> None:
    """Prints what the model says and does, a line each."""
    for block in message.content:
        if isinstance(block, TextBlock):
            print(one_line(block.text, PROGRESS))
        elif isinstance(block, ToolUseBlock):
            print(one_line(f"{block.name} {json.dumps(block.input)}", PROGRESS))


def one_line(text: str, most: int) -> str:
    """`text` without line breaks, cut to `most` characters."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= most else line[: most - 3] + "..."


def ending(job: dict[str, Any], session: Session, result: ResultMessage | None) -> tuple[str, str]:
    """How the session ended, and the detail."""
    if session.spent:
        return "tokens", f"max_tokens={job['max_tokens']} reached: {session.tokens} generated"
    if result is None:
        return "error", "the CLI ended without a result"
    if result.subtype == "error_max_turns":
        return "turns", f"max_turns={job['max_turns']} reached"
    if result.is_error or result.subtype != "success":
        status = f"HTTP {result.api_error_status}: " if result.api_error_status else ""
        reason = result.result or "; ".join(result.errors or ()) or result.subtype
        return "error", f"{status}{reason}"
    return "done", result.result or ""


def main() -> None:
    """Runs the session and prints its ending."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    job = json.loads(Path(__file__).with_name("job.json").read_text("utf-8"))
    folder = Path(tempfile.gettempdir(), ".claude-session")  # the same place every time
    folder.mkdir(mode=0o700)
    session = None
    try:
        session = Session(job, data=args.dataset_dir, work=args.working_dir, folder=folder)
        end, detail = ending(job, session, asyncio.run(session.run()))
    except Exception as error:
        # The SDK also raises bare ones: "Control request timeout: initialize".
        if not isinstance(error, ClaudeSDKError) and type(error) is not Exception:
            raise
        end, detail = "error", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    turns = session.turns if session else 0
    print(json.dumps({"end": end, "detail": one_line(detail, DETAIL), "turns": turns}))


if __name__ == "__main__":
    main()
