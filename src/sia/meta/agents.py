"""The agents that can play Meta-Agent and Feedback-Agent: which program drives them, and how far.

An agent is a program of `sia/meta/drivers/` that runs inside the sandbox with the SDK of its name.
It knows nothing of SIA: it reads `job.json` beside itself, works in its working folder, and prints
how it ended.
"""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import ClassVar

from sia.errors import MetaBackendError
from sia.sandbox.environments import current_runtime, runtime_of
from sia.sandbox.protocol import Limits, Runtime

DRIVERS = Path(__file__).with_name("drivers")
ASK_S = 60
# Of a session. Address space, not memory: the engine inside the Claude CLI reserves 10 GiB when it
# starts and uses 0.2 GiB of them. Agents start compilers, test runners and the target itself.
LIMITS = Limits(memory_mib=32_768, processes=512, file_mib=512, disk_mib=2048, output_kib=1024)
QUESTION = """
import importlib.util, json, sys
try:
    found = importlib.util.find_spec(sys.argv[1]) is not None
except ModuleNotFoundError:
    found = False
print(json.dumps([sys.prefix, sys.exec_prefix, sys.base_prefix, found]))
"""


class Agent:
    """One agent SDK with its limits.

    Args:
        model: A model id of the provider, or one of its aliases.
        max_turns: Calls to the model in one session; reaching it ends the session, not the run.
        max_tokens: Generated tokens in one session; None for no limit but the budget's.
        session_s: Deadline of one session.
        python: An interpreter that has the SDK; None for the one that runs SIA.
    """

    name: ClassVar[str]
    format: ClassVar[str]  # that its provider must speak
    package: ClassVar[str]  # what the interpreter must be able to import
    install: ClassVar[str]
    limits: ClassVar[Limits] = LIMITS

    def __init__(
        self,
        *,
        model: str,
        max_turns: int = 40,
        max_tokens: int | None = None,
        session_s: float = 1800.0,
        python: str | None = None,
    ) -> None:
        self.model = model
        self.max_turns = max_turns
        self.max_tokens = max_tokens
        self.session_s = session_s
        self._python = python

    @property
    def program(self) -> Path:
        """The driver."""
        return DRIVERS / f"{self.name}.py"

    def runtime(self) -> Runtime:
        """The interpreter that has the SDK.

        Raises:
            MetaBackendError: It has not, or does not run.
        """
        if self._python is None:
            if not _installed(self.package):
                raise MetaBackendError(
                    f"meta={self.name} needs the package {self.package!r}, which is not installed "
                    f"here. {self.install}"
                )
            return current_runtime()
        try:
            answer = subprocess.run(
                [self._python, "-I", "-c", QUESTION, self.package],
                capture_output=True,
                text=True,
                timeout=ASK_S,
                check=True,
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise MetaBackendError(
                f"meta.python={self._python!r} does not run: {error}. Give the path of a Python "
                f"interpreter. {self.install}"
            ) from error
        *prefixes, found = json.loads(answer)
        if not found:
            raise MetaBackendError(
                f"meta.python={self._python!r} has no package {self.package!r}. {self.install}"
            )
        return runtime_of(Path(self._python), *map(Path, prefixes))


def _installed(package: str) -> bool:
    """Whether this interpreter has a package, possibly one inside another."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


class Claude(Agent):
    """Claude Agent SDK; speaks the Anthropic format."""

    name = "claude"
    format = "messages"
    package = "claude_agent_sdk"
    install = "Install it: pip install 'sia-framework[claude]'"


class OpenHands(Agent):
    """OpenHands SDK; needs Python 3.12 or newer and, beside SIA, an interpreter of its own."""

    name = "openhands"
    format = "chat"
    package = "openhands.sdk"
    install = (
        "Give it an environment of its own: scripts/openhands, then "
        "meta.python=.venv-openhands/bin/python"
    )


class PydanticAI(Agent):
    """Pydantic AI with tools for files and a shell; speaks the OpenAI chat format."""

    name = "pydantic_ai"
    format = "chat"
    package = "pydantic_ai"
    install = "Install it: pip install 'sia-framework[pydantic-ai]'"
