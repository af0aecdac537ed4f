"""Drives OpenHands inside the sandbox: `openhands.py --dataset_dir D --working_dir W`.

A program of its own that runs inside the sandbox, in an environment of its own. It reads `job.json`
beside itself, lets the agent work in W, and prints as its last line how the session ended.

What it asks the model is a function of the job and of what the model and its tools answer, so that
a recorded session can be repeated. What still varies, and where:

- the working folder, in the description of `file_editor` and in answers of both tools, where the
  sandbox has no fixed one (`sandbox=process`);
- the path of this interpreter, in answers of `terminal`;
- what commands print: dates, the user id of the sandbox, timings.

Switched off: skills, plugins, sub-agents, condensation, files of the conversation, telemetry,
prices from the network, and all second attempts at a call (the gateway makes them).
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DETAIL = 500  # characters
CALL_S = 24 * 3600  # the gateway's own deadline comes first
QUIET = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else fetched from the network at import
    "LITELLM_MODE": "PRODUCTION",  # else a .env file found above the packages is loaded
    "LOG_LEVEL": "ERROR",
    "LOG_RICH_TRACEBACKS": "false",
    "OPENHANDS_SUPPRESS_BANNER": "1",
    "OTEL_SDK_DISABLED": "true",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the session ended: `done`, `turns`, `tokens` or `error`."""

    end: str
    detail: str = ""
    turns: int = 0


def main() -> None:
    """Runs the session; everything that others print goes to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--working_dir", required=True)
    args = parser.parse_args()
    # This file has the name of the package that it needs, and its folder comes first.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
    os.environ.update(QUIET)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            job = json.loads((HERE / "job.json").read_text(encoding="utf-8"))
            with belongings() as shell:
                ending = session(job, Path(args.working_dir).resolve(), shell)
        except Exception as error:
            traceback.print_exc()
            ending = Ending(end="error", detail=f"{type(error).__name__}: {error}")
    print(json.dumps(asdict(ending) | {"detail": ending.detail[:DETAIL]}), flush=True)


@contextlib.contextmanager
def belongings() -> Iterator[dict[str, str]]:
    """A folder for what the SDK keeps; gives the variables of the agent's shell.

    The folder has a fixed name, because an agent may see it, and what an agent sees is sent.
    """
    temporary = tempfile.gettempdir()
    folder = Path(temporary) / ".session"
    folder.mkdir(exist_ok=True)
    inputrc = folder / "inputrc"
    inputrc.write_text("set enable-bracketed-paste off\n", encoding="utf-8")
    shell = {
        "HISTFILE": os.devnull,
        "HOME": os.environ.get("HOME", temporary),
        "INPUTRC": str(inputrc),
        "TMPDIR": temporary,
    }
    os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield shell
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def session(job: dict[str, Any], work: Path, shell: dict[str, str]) -> Ending:
    """Lets the agent work until it is done or a limit is reached."""
    import httpx
    import litellm
    from openhands.sdk import LLM, Agent, LocalConversation, Tool
    from openhands.sdk.conversation.exceptions import ConversationRunError
    from openhands.tools.file_editor import FileEditorTool
    from openhands.tools.terminal import TerminalTool

    # The gateway retries, under one deadline. `num_retries` below does not reach the client of
    # the wire format, which tries three times unless the answer says that it should not.
    litellm.client_session = httpx.Client(event_hooks={"response": [final]})
    llm = LLM(
        model=f"openai/{job['model']}",  # the prefix is the wire format
        base_url=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"],
        num_retries=0,
        timeout=CALL_S,
        reasoning_effort=None,
        extended_thinking_budget=None,
        input_cost_per_token=0.0,  # the gateway counts; without a price every call warns
        output_cost_per_token=0.0,
    )
    agent = Agent(
        llm=llm,
        tools=[
            Tool(name=TerminalTool.name, params={"terminal_type": "subprocess", "env": shell}),
            Tool(name=FileEditorTool.name),
        ],
        include_default_tools=["FinishTool"],
        system_prompt=job["system"],
    )
    usage = llm.metrics
    spent = False

    def watch(_: object) -> None:
        nonlocal spent
        total = usage.accumulated_token_usage
        if job["max_tokens"] and total and total.completion_tokens >= job["max_tokens"]:
            spent = True
            conversation.pause()

    conversation = LocalConversation(
        agent=agent,
        workspace=work,
        # It names the vendor's cache shard: the same for the same session, another for others.
        conversation_id=uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(job, sort_keys=True)),
        callbacks=[watch],
        max_iteration_per_run=job["max_turns"],
        visualizer=None,
    )
    failure = ""
    try:
        conversation.send_message(job["prompt"])
        conversation.run()
    except ConversationRunError as error:
        cause = error.__cause__ or error
        failure = f"{type(cause).__name__}: {cause}"
    finally:
        conversation.close()
    status = conversation.state.execution_status.value
    turns = len(usage.response_latencies)
    if failure:
        return Ending(end="error", detail=failure, turns=turns)
    if status == "finished":
        return Ending(end="done", turns=turns)
    if spent:
        return Ending(end="tokens", detail=f"max_tokens={job['max_tokens']} reached", turns=turns)
    if status == "stuck":
        return Ending(end="turns", detail="stuck: it repeated itself", turns=turns)
    return Ending(end="turns", detail=f"max_turns={job['max_turns']} reached", turns=turns)


def final(response: Any) -> None:
    """Marks an answer as one that is not to be asked for again."""
    response.headers["x-should-retry"] = "false"


if __name__ == "__main__":
    main()
