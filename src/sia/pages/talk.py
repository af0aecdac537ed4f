"""Conversations: what a target recorded of its items, and what an agent said to its model.

Targets write what they like. Nothing here raises because of what a file holds; what is no
conversation is shown as the text that it is.
"""

import json
from dataclasses import dataclass
from typing import Any

from sia.gateway.store import Exchange
from sia.tracking.messages import conversation, text_of

MAX_TEXT = 20_000  # characters shown of one message
MAX_TURNS = 400  # messages shown of one conversation
LISTS = ("messages", "trajectory", "steps", "turns", "events", "conversation", "history")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool that a message calls."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message.

    Attributes:
        role: `system`, `user`, `assistant`, `tool`, or whatever the author called it.
        left_out: Characters that are not shown.
    """

    role: str
    text: str
    calls: tuple[Call, ...] = ()
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Talk:
    """A conversation.

    Attributes:
        left_out: Messages in the middle that are not shown.
        raw: The file as it is, where it holds no conversation.
    """

    turns: tuple[Turn, ...]
    left_out: int = 0
    raw: str = ""


def read(data: bytes) -> Talk:
    """The conversation in a trajectory file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return Talk(turns=(), raw=data[:MAX_TEXT].decode("utf-8", "replace"))
    messages = _messages(value)
    if messages:
        return _talk(messages)
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return Talk(turns=(), raw=text[:MAX_TEXT])


def of_session(exchange: Exchange) -> Talk:
    """What an agent and its model said to one another up to this call, the reply included."""
    told = conversation(exchange.format, exchange.request(), exchange.body())
    replies = [choice.get("message") for choice in told.outputs.get("choices", [])][:1]
    return _talk([*told.inputs.get("messages", []), *replies])


def _messages(value: Any) -> list[Any]:
    """The list of messages in it, wherever it lies."""
    if isinstance(value, list):
        return value if any(_is_message(one) for one in value) else []
    if isinstance(value, dict):
        for name in LISTS:
            if found := _messages(value.get(name)):
                return found
    return []


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("content" in value or "tool_calls" in value)


def _talk(messages: list[Any]) -> Talk:
    left_out = max(0, len(messages) - MAX_TURNS)
    if left_out:
        messages = [*messages[: MAX_TURNS // 2], *messages[-(MAX_TURNS // 2) :]]
    return Talk(turns=tuple(map(_turn, messages)), left_out=left_out)


def _turn(value: Any) -> Turn:
    if not isinstance(value, dict):
        return _bounded("", _plain(value), [])
    content = value.get("content")
    text = text_of(content) if isinstance(content, str | list) else ""
    if not text and content not in (None, "", []):
        text = _plain(content)
    blocks = content if isinstance(content, list) else []
    calls = [
        Call(name=str(block.get("name", "")), arguments=_plain(block.get("input")))
        for block in blocks
        if isinstance(block, dict) and block.get("type") == "tool_use"
    ]
    listed = value.get("tool_calls")
    for call in listed if isinstance(listed, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict):
            calls.append(
                Call(
                    name=str(function.get("name", "")), arguments=_plain(function.get("arguments"))
                )
            )
    return _bounded(str(value.get("role") or value.get("type") or ""), text, calls)


def _bounded(role: str, text: str, calls: list[Call]) -> Turn:
    cut = tuple(Call(name=one.name[:200], arguments=one.arguments[:MAX_TEXT]) for one in calls[:50])
    left_out = max(0, len(text) - MAX_TEXT)
    return Turn(role=role[:40], text=text[:MAX_TEXT], calls=cut, left_out=left_out)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
