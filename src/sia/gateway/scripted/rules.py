"""What a scripted endpoint says to what: a list of rules, the first that fits wins."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sia.errors import ConfigError

# An action of a script -> what the tool that does it is called by each agent, and its arguments.
TOOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "write": {
        "Write": ("file_path", "content"),
        "write_file": ("path", "content"),
        "file_editor": ("path", "file_text"),
    },
    "bash": {"Bash": ("command",), "run": ("command",), "terminal": ("command",)},
}
FIXED_ARGUMENTS = {"file_editor": {"command": "create"}}
FAULTS = (
    "", "hang", "status", "empty_choices", "truncated", "invalid_json", "huge", "surrogate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class When:
    """Which requests a rule is for; everything that is given must hold.

    Attributes:
        text: A regular expression that occurs in the conversation, the system prompt included.
        last: The same for the last message alone.
        turn: How many answers of the assistant the conversation holds so far.
        model: The model that is asked for.
        times: The rule fits so many requests at most; 0 means any number.
    """

    text: str = ""
    last: str = ""
    turn: int | None = None
    model: str = ""
    times: int = 0


@dataclass(frozen=True, kw_only=True)
class Write:
    """A file to be written with the tool that the agent offers for it."""

    path: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens to be reported; None: the size of the texts, four characters a token."""

    input: int | None = None
    output: int | None = None
    cached: int = 0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One answer.

    Attributes:
        say: The text; `<<1>>` stands for the first group of the expression that matched.
        write: Calls the tool that writes a file.
        bash: Calls the tool that runs a command.
        tool: Calls a tool by its name, with arguments: {name: ..., arguments: {...}}.
        wait_s: The answer comes so much later.
        fault: `hang` accepts and never answers; `status` answers with the HTTP status `status`;
            `empty_choices`, `truncated` (ends in the middle), `invalid_json`, `huge` (5 MB of
            text) and `surrogate` (half a character) are what they say.
        retry_after: Seconds, for `status`.
    """

    when: When = field(default_factory=When)
    say: str = ""
    write: Write | None = None
    bash: str = ""
    tool: dict[str, Any] | None = None
    wait_s: float = 0.0
    fault: str = ""
    status: int = 500
    retry_after: float | None = None
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, whatever its format.

    Attributes:
        texts: Of the system prompt and of every message, in order.
        turns: Answers of the assistant among them.
        tools: Names of the tools that are offered.
    """

    model: str
    texts: tuple[str, ...]
    turns: int
    tools: tuple[str, ...]
    embeddings: bool


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, whatever its format; `calls` are (name, arguments) of tools."""

    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...]
    input_tokens: int
    output_tokens: int
    cached_tokens: int


def read_rules(path: Path) -> list[Rule]:
    """The rules of a YAML file, a list.

    Raises:
        ConfigError: It cannot be read, or is not a list of rules.
    """
    try:
        return parse_rules(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, yaml.YAMLError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{path} is not a list of rules: {error}") from error


def parse_rules(data: Any) -> list[Rule]:
    """Rules from plain data.

    Raises:
        ValueError: A fault that does not exist.
    """
    rules = msgspec.convert(data, list[Rule])
    for rule in rules:
        if rule.fault not in FAULTS:
            raise ValueError(f"fault={rule.fault!r} is none of {', '.join(FAULTS[1:])}")
    return rules


def choose(rules: Sequence[Rule], used: list[int], asked: Asked) -> tuple[Rule, Reply] | None:
    """The first rule that fits, with its answer; `used` counts how often each rule was taken.

    Embeddings need no rule.
    """
    for number, rule in enumerate(rules):
        when = rule.when
        if when.turn is not None and when.turn != asked.turns:
            continue
        if (when.model and when.model != asked.model) or 0 < when.times <= used[number]:
            continue
        found = re.search(when.text, "\n".join(asked.texts), re.DOTALL)
        last = re.search(when.last, asked.texts[-1] if asked.texts else "", re.DOTALL)
        if found is None or last is None:
            continue
        used[number] += 1
        return rule, reply(rule, asked, last if when.last else found)
    if asked.embeddings:
        rule = Rule()
        return rule, reply(rule, asked, re.match("", ""))  # type: ignore[arg-type]  # it matches
    return None


def reply(rule: Rule, asked: Asked, match: re.Match[str]) -> Reply:
    """What `rule` says to a request in which its expression matched."""

    def fill(text: str) -> str:
        return re.sub(r"<<(\d)>>", lambda number: match[int(number[1])] or "", text)

    calls: list[tuple[str, dict[str, Any]]] = []
    if rule.write:
        calls.append(_call("write", asked, rule.write.path, fill(rule.write.text)))
    if rule.bash:
        calls.append(_call("bash", asked, fill(rule.bash)))
    if rule.tool:
        calls.append((rule.tool["name"], rule.tool.get("arguments", {})))
    text = fill(rule.say)
    said = len(text) + sum(len(str(arguments)) for _, arguments in calls)
    usage = rule.usage
    return Reply(
        text=text,
        calls=tuple(calls),
        input_tokens=sum(map(len, asked.texts)) // 4 if usage.input is None else usage.input,
        output_tokens=max(1, said // 4) if usage.output is None else usage.output,
        cached_tokens=usage.cached,
    )


def _call(action: str, asked: Asked, *values: str) -> tuple[str, dict[str, Any]]:
    """The tool that does `action`; the first one's name where none is offered."""
    known = TOOLS[action]
    name = next((tool for tool in asked.tools if tool in known), next(iter(known)))
    arguments = dict(zip(known[name], values, strict=True))
    return name, {**FIXED_ARGUMENTS.get(name, {}), **arguments}
