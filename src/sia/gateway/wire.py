"""The wire formats: where they are, what an answer says of itself, what an error looks like.

An answer is read while it passes: its bytes go on as they came, except for what is written here.
A stream goes on event by event, so that a torn event is never half delivered; and of a stream of
chat completions the chunk with the usage is dropped if only the gateway asked for it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sia.gateway.provider import Usage

CHARACTERS_PER_TOKEN = 4  # where a vendor does not count
MOST_TOKENS = 2**40  # a vendor that counts more miscounts
TOO_DEEP = "the answer is nested too deeply"
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One wire format.

    Attributes:
        path: Where callers find it, and providers too, after `/v1`.
        spoken: Which of a provider's `formats` it belongs to.
        see: Reads one JSON document of an answer: the whole of it, or one event.
        counted: Whether a call is charged, counted and subject to the budget.
    """

    name: str
    path: str
    spoken: str
    see: Callable[["Reader", dict[str, Any]], None]
    counted: bool = True
    anthropic: bool = False


class Reader:
    """What one answer says of itself, and the bytes of it that go on.

    Attributes:
        model: The exact id of the model that answered, as the vendor says.
        finish: The vendor's word for why it stopped.
        usage: None until the vendor has said it.
        characters: Length of the generated text, to estimate tokens by.
        ended: A stream has sent its last event.
        failure: Why the answer is of no use; empty if it is of use.
        told: The stream itself has said so.
    """

    def __init__(self, wire: Format, *, hide_usage: bool = False) -> None:
        self._wire = wire
        self._hide_usage = hide_usage
        self._buffer = bytearray()
        self._searched = 0
        self.model = ""
        self.finish = ""
        self.usage: Usage | None = None
        self.characters = 0
        self.content = False
        self.ended = False
        self.failure = ""
        self.told = False

    def whole(self, body: bytes) -> None:
        """Reads an answer that came in one piece."""
        try:
            data = json.loads(body)
        except ValueError:
            self.failure = "the answer is not JSON"
            return
        except RecursionError:
            self.failure = TOO_DEEP
            return
        if not isinstance(data, dict):
            self.failure = "the answer is not a JSON object"
            return
        self._see(data)
        if not self.failure and not self.content:
            self.failure = f"the answer is empty: {_NOTHING[self._wire.name]}"

    def feed(self, chunk: bytes) -> bytes:
        """Reads the next bytes of a stream; gives the events that are whole now."""
        self._buffer += chunk
        events = []
        while not self.failure and (found := EVENT_END.search(self._buffer, self._searched)):
            event = bytes(self._buffer[: found.end()])
            del self._buffer[: found.end()]
            self._searched = 0
            if self._event(event):
                events.append(event)
        self._searched = max(0, len(self._buffer) - 3)
        return b"".join(events)

    def finish_stream(self) -> bytes:
        """Says that no more will come; gives a last event that lacks its empty line."""
        rest = self.feed(b"\n\n") if self._buffer.strip() else b""
        # Some vendors end a stream of chat completions without [DONE].
        whole = self.ended or (self._wire is CHAT and self.finish)
        if not self.failure and not whole:
            self.failure = "the stream was cut off before its end"
        elif not self.failure and not self.content:
            self.failure = f"the answer is empty: {_NOTHING[self._wire.name]}"
        return rest

    def _event(self, event: bytes) -> bool:
        """Reads one event of a stream; False if it is not to go on."""
        lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
        if not lines:
            return True
        text = b"\n".join(lines)
        if text == b"[DONE]":
            self.ended = True
            return True
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            self.failure = "the stream holds an event that is not JSON"
            return False
        if not isinstance(data, dict):
            return True
        self._see(data)
        return not (self._hide_usage and data.get("choices") == [] and data.get("usage"))

    def _see(self, data: dict[str, Any]) -> None:
        try:
            if data.get("error"):
                self.fail(data)
            else:
                self._wire.see(self, data)
        except RecursionError:
            self.failure = TOO_DEEP

    def fail(self, error: dict[str, Any]) -> None:
        """Notes an error that the vendor puts into its answer."""
        self.failure = f"the provider says: {error_text(error)}"
        self.told = True


def see_chat(reader: Reader, data: dict[str, Any]) -> None:
    """A chat completion, or a chunk of one."""
    reader.model = _text(data.get("model")) or reader.model
    choices = data.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        reader.content = True
        if isinstance(choice, dict):
            reader.finish = _text(choice.get("finish_reason")) or reader.finish
            reader.characters += text_length(choice.get("delta") or choice.get("message"))
    if isinstance(usage := data.get("usage"), dict):
        reader.usage = _openai_usage(usage, "prompt", "completion")


def see_responses(reader: Reader, data: dict[str, Any]) -> None:
    """A response, or an event of its stream."""
    kind = _text(data.get("type"))
    if kind.endswith(".delta"):
        reader.content = True
        reader.characters += text_length(data.get("delta"))
        return
    if kind == "error":
        reader.fail(data)
        return
    response = data.get("response") if kind.startswith("response.") else data
    if not isinstance(response, dict):
        return
    reader.model = _text(response.get("model")) or reader.model
    if isinstance(usage := response.get("usage"), dict):
        reader.usage = _openai_usage(usage, "input", "output")
    status = _text(response.get("status"))
    if status in ("completed", "incomplete", "failed", "cancelled"):
        reader.ended = True
        reader.finish = status
    if isinstance(output := response.get("output"), list) and output:
        reader.content = True
        if not kind:
            reader.characters = text_length(output)
    if status == "failed":
        reader.fail(response)


def see_messages(reader: Reader, data: dict[str, Any]) -> None:
    """A message, or an event of its stream."""
    kind = data.get("type")
    if kind == "message_stop":
        reader.ended = True
        return
    if kind in ("content_block_start", "content_block_delta"):
        reader.content = True
        reader.characters += text_length(data.get("delta") or data.get("content_block"))
        return
    message = data.get("message") if kind == "message_start" else data
    if not isinstance(message, dict):
        return
    reader.model = _text(message.get("model")) or reader.model
    ended = data.get("delta") if kind == "message_delta" else message
    if isinstance(ended, dict):
        reader.finish = _text(ended.get("stop_reason")) or reader.finish
    if isinstance(usage := message.get("usage"), dict):
        reader.usage = _anthropic_usage(usage, reader.usage)
    if isinstance(content := message.get("content"), list) and content:
        reader.content = True
        reader.characters = text_length(content)


def see_embeddings(reader: Reader, data: dict[str, Any]) -> None:
    """A list of embeddings."""
    reader.model = _text(data.get("model"))
    reader.content = bool(data.get("data"))
    if isinstance(usage := data.get("usage"), dict):
        reader.usage = _openai_usage(usage, "prompt", "completion")


def see_count(reader: Reader, data: dict[str, Any]) -> None:
    """A count of tokens."""
    reader.content = "input_tokens" in data


CHAT = Format(name="chat", path="/chat/completions", spoken="chat", see=see_chat)
RESPONSES = Format(name="responses", path="/responses", spoken="responses", see=see_responses)
MESSAGES = Format(
    name="messages", path="/messages", spoken="messages", see=see_messages, anthropic=True
)
EMBEDDINGS = Format(name="embeddings", path="/embeddings", spoken="embeddings", see=see_embeddings)
COUNT = Format(
    name="count_tokens",
    path="/messages/count_tokens",
    spoken="messages",
    see=see_count,
    counted=False,
    anthropic=True,
)
WIRES = (CHAT, RESPONSES, MESSAGES, EMBEDDINGS, COUNT)

_NOTHING = {
    "chat": "no choices",
    "responses": "no output",
    "messages": "no content",
    "embeddings": "no data",
    "count_tokens": "no count",
}


def error_body(message: str, *, status: int, anthropic: bool) -> bytes:
    """An error in the shape that the SDKs of the format read."""
    kind = ERROR_TYPES.get(status, "api_error")
    error: dict[str, Any] = {"type": kind, "message": message}
    if anthropic:
        return json.dumps({"type": "error", "error": error}).encode()
    return json.dumps({"error": {**error, "param": None, "code": None}}).encode()


def error_event(message: str, wire: Format) -> bytes:
    """The event that ends a stream which cannot go on."""
    body = json.loads(error_body(message, status=502, anthropic=wire.anthropic))
    if wire is RESPONSES:
        body = {"type": "error", "code": "api_error", "message": message, "param": None, **body}
    head = b"" if wire is CHAT else b"event: error\n"
    return head + b"data: " + json.dumps(body).encode() + b"\n\n"


def error_text(data: Any) -> str:
    """What an error of a vendor says, in one line."""
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        error = error.get("message") or json.dumps(error)
    return " ".join(str(error).split())[:500]


def estimate(characters: int) -> int:
    """Tokens of a text that nobody counted."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < MOST_TOKENS else 0


def text_length(value: Any) -> int:
    """How many characters of text a JSON value holds, names of members left out."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(text_length, value.values()))
    if isinstance(value, list):
        return sum(map(text_length, value))
    return 0


def _openai_usage(usage: Mapping[str, Any], prompt: str, completion: str) -> Usage:
    given = _count(usage.get(f"{prompt}_tokens"))
    made = _count(usage.get(f"{completion}_tokens"))
    details = usage.get(f"{prompt}_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    # Some vendors count their reasoning in the total only; it is paid for as output.
    made = max(made, _count(usage.get("total_tokens")) - given)
    return Usage(input_tokens=given, cached_tokens=min(cached, given), output_tokens=made)


def _anthropic_usage(usage: Mapping[str, Any], before: Usage | None) -> Usage:
    """Later events of a stream repeat only some of the counts."""
    before = before or Usage()
    cached = _count(usage.get("cache_read_input_tokens")) or before.cached_tokens
    written = _count(usage.get("cache_creation_input_tokens")) or before.cache_write_tokens
    known = before.input_tokens - before.cached_tokens - before.cache_write_tokens
    plain = _count(usage.get("input_tokens")) or known
    return Usage(
        input_tokens=plain + cached + written,
        cached_tokens=cached,
        cache_write_tokens=written,
        output_tokens=_count(usage.get("output_tokens")) or before.output_tokens,
    )
