"""What was asked and answered in one model call, whatever the wire format: messages in one shape.

The shape is that of OpenAI's chat format, which MLflow's page shows as a conversation. Recordings
may be cut off, invalid or huge; nothing here raises because of what they hold.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_TEXT = 8_000  # characters kept of one text
MAX_REQUEST = 48_000  # characters kept of one request; the first and the last messages stay
MAX_INPUTS = 8  # texts kept of one call for embeddings
MAX_DEPTH = 50  # of nested values
ENDS = {  # reasons of the Anthropic and the responses format, in the words of the chat format
    "end_turn": "stop",
    "completed": "stop",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "tool_use": "tool_calls",
}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One call.

    Attributes:
        inputs: The request: messages, and what else of it is a plain value.
        outputs: The reply; empty where none came.
        prompt: Text of the first message of the user.
        reply: Text of the reply, with the tools that it calls.
        tools: Names of the tools that were offered.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    prompt: str
    reply: str
    tools: tuple[str, ...]


def conversation(format: str, request: Any, response: bytes) -> Conversation:
    """Reads one recorded call.

    Args:
        format: `chat`, `responses`, `messages` or `embeddings`.
        request: A JSON value; None where it was not kept.
        response: JSON, or the events of a stream.
    """
    body = request if isinstance(request, dict) else {}
    answer = _object(response)
    events = list(_events(response)) if not answer else []
    if format == "embeddings":
        return _embeddings(body, answer)
    if format == "messages":
        messages = list(_from_anthropic(body))
        choices = [_anthropic_choice(answer or _joined_messages(events))]
    elif format == "responses":
        messages = list(_from_responses(body))
        choices = [_responses_choice(answer or _joined_responses(events))]
    else:
        messages = [entry for entry in _list(body.get("messages")) if isinstance(entry, dict)]
        choices = _list(answer.get("choices")) or _joined_chat(events)
    choices = [one for one in choices if isinstance(one, dict) and _is_message(one.get("message"))]
    outputs: dict[str, Any] = {"choices": [_clean(choice) for choice in choices]} if choices else {}
    error = answer.get("error") or next((e["error"] for e in events if e.get("error")), None)
    if error:
        outputs["error"] = _clean(error)
    plain = {
        name: value
        for name, value in body.items()
        if isinstance(value, str | int | float) and name not in ("input", "instructions", "system")
    }
    first = next((m for m in messages if m.get("role") == "user"), {})
    return Conversation(
        inputs={**_clean(plain), "messages": _bounded([_clean(entry) for entry in messages])},
        outputs=outputs,
        prompt=_clean(text_of(first.get("content"))),
        reply=_clean(_spoken(choices[0]["message"])) if choices else "",
        tools=tuple(_tool_names(body)),
    )


def text_of(content: Any) -> str:
    """The readable part of a message's content, which is a text or a list of parts."""
    if isinstance(content, str):
        return content
    parts = []
    for part in _list(content):
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, dict):
            known = [part[key] for key in ("text", "thinking", "refusal") if key in part]
            text = known[0] if known else f"[{part.get('type', 'part')}]"
            parts.append(text if isinstance(text, str) else "")
    return "\n".join(parts)


def _spoken(message: dict[str, Any]) -> str:
    lines = [text_of(message.get("content"))]
    for call in _list(message.get("tool_calls")):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            lines.append(f"{function.get('name')}({function.get('arguments')})")
    return "\n".join(filter(None, lines))


def _from_anthropic(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if body.get("system"):
        yield {"role": "system", "content": text_of(body["system"])}
    for entry in _list(body.get("messages")):
        if isinstance(entry, dict):
            yield from _anthropic_entry(entry)


def _anthropic_entry(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    content = entry.get("content")
    blocks = [block for block in _list(content) if isinstance(block, dict)]
    for block in blocks:
        if block.get("type") == "tool_result":
            yield {
                "role": "tool",
                "tool_call_id": str(block.get("tool_use_id", "")),
                "content": text_of(block.get("content")),
            }
    calls = [_call(b.get("id"), b.get("name"), b.get("input")) for b in blocks if _is_call(b)]
    said = [b for b in blocks if b.get("type") not in ("tool_result", "tool_use")]
    text = content if isinstance(content, str) else text_of(said)
    if text or calls:
        message = {"role": str(entry.get("role", "user")), "content": text}
        yield {**message, "tool_calls": calls} if calls else message


def _anthropic_choice(answer: dict[str, Any]) -> dict[str, Any]:
    said = next(_anthropic_entry({"role": "assistant", "content": answer.get("content")}), None)
    if said is None:
        return {}
    return _choice(said, answer.get("stop_reason"))


def _from_responses(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if body.get("instructions"):
        yield {"role": "system", "content": text_of(body["instructions"])}
    given = body.get("input")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
    for item in _list(given):
        if not isinstance(item, dict):
            continue
        kind = item.get("type", "message")
        if kind == "function_call":
            call = _call(item.get("call_id"), item.get("name"), item.get("arguments"))
            yield {"role": "assistant", "content": "", "tool_calls": [call]}
        elif kind == "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else text_of(output)
            yield {"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": text}
        elif kind == "message":
            yield {"role": str(item.get("role", "user")), "content": text_of(item.get("content"))}


def _responses_choice(answer: dict[str, Any]) -> dict[str, Any]:
    texts, calls = [], []
    for item in _list(answer.get("output")):
        if not isinstance(item, dict):
            continue
        if item.get("type") == "message":
            texts.append(text_of(item.get("content")))
        elif item.get("type") == "function_call":
            calls.append(_call(item.get("call_id"), item.get("name"), item.get("arguments")))
    if not texts and not calls:
        return {}
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    details = answer.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else answer.get("status")
    return _choice(message, "tool_calls" if calls and reason == "completed" else reason)


def _choice(message: dict[str, Any], reason: Any) -> dict[str, Any]:
    return {"index": 0, "message": message, "finish_reason": ENDS.get(str(reason), reason)}


def _joined_chat(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that the events of a chat stream add up to."""
    choices: dict[int, dict[str, Any]] = {}
    calls: dict[int, dict[int, dict[str, Any]]] = {}
    for event in events:
        for piece in _list(event.get("choices")):
            if not isinstance(piece, dict):
                continue
            index = _place(piece.get("index"))
            choice = choices.setdefault(
                index,
                {
                    "index": index,
                    "message": {"role": "assistant", "content": ""},
                    "finish_reason": None,
                },
            )
            choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
            delta = piece.get("delta")
            if not isinstance(delta, dict):
                continue
            if isinstance(delta.get("content"), str):
                choice["message"]["content"] += delta["content"]
            for part in _list(delta.get("tool_calls")):
                if not isinstance(part, dict):
                    continue
                known = calls.setdefault(index, {})
                call = known.setdefault(_place(part.get("index")), _call(None, "", ""))
                call["id"] = part.get("id") or call["id"]
                function = part.get("function")
                if isinstance(function, dict):
                    call["function"]["name"] += str(function.get("name") or "")
                    call["function"]["arguments"] += str(function.get("arguments") or "")
    for index, known in calls.items():
        choices[index]["message"]["tool_calls"] = [known[place] for place in sorted(known)]
    return [choices[index] for index in sorted(choices)]


def _joined_messages(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer that the events of an Anthropic stream add up to."""
    blocks: dict[int, dict[str, Any]] = {}
    answer: dict[str, Any] = {}
    for event in events:
        kind, place = event.get("type"), _place(event.get("index"))
        delta = event.get("delta")
        if kind == "content_block_start" and isinstance(event.get("content_block"), dict):
            blocks[place] = {**event["content_block"], "partial": ""}
        elif kind == "content_block_delta" and isinstance(delta, dict) and place in blocks:
            block = blocks[place]
            for name in ("text", "thinking"):
                if isinstance(delta.get(name), str):
                    block[name] = str(block.get(name) or "") + delta[name]
            block["partial"] += str(delta.get("partial_json") or "")
        elif kind == "message_delta" and isinstance(delta, dict):
            answer["stop_reason"] = delta.get("stop_reason")
    for block in blocks.values():
        partial = block.pop("partial")
        if _is_call(block) and partial:
            block["input"] = partial
    answer["content"] = [blocks[place] for place in sorted(blocks)]
    return answer


def _joined_responses(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer at the end of a responses stream, or what came before it broke."""
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        kind, place = str(event.get("type")), _place(event.get("output_index"))
        ended = kind in ("response.completed", "response.incomplete", "response.failed")
        if ended and isinstance(event.get("response"), dict):
            answer: dict[str, Any] = event["response"]
            return answer
        if kind.startswith("response.output_item.") and isinstance(event.get("item"), dict):
            items[place] = {**event["item"]}
        elif kind == "response.output_text.delta" and place in items:
            parts = _list(items[place].get("content"))
            text = text_of(parts) + str(event.get("delta") or "")
            items[place]["content"] = [{"type": "output_text", "text": text}]
        elif kind == "response.function_call_arguments.delta" and place in items:
            arguments = str(items[place].get("arguments") or "")
            items[place]["arguments"] = arguments + str(event.get("delta") or "")
    return {"output": [items[place] for place in sorted(items)], "status": "incomplete"}


def _embeddings(body: dict[str, Any], answer: dict[str, Any]) -> Conversation:
    given = body.get("input")
    texts = [given] if isinstance(given, str) else _list(given)
    count = len(_list(answer.get("data")))
    plain = {k: v for k, v in body.items() if isinstance(v, str | int | float) and k != "input"}
    return Conversation(
        inputs={**_clean(plain), "input": _clean([str(text) for text in texts[:MAX_INPUTS]])},
        outputs={"embeddings": count} if count else {},
        prompt=_clean(str(texts[0])) if texts else "",
        reply=f"{count} embeddings" if count else "",
        tools=(),
    )


def _call(identity: Any, name: Any, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": str(name or ""), "arguments": text}
    return {"id": str(identity or ""), "type": "function", "function": function}


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_call(block: dict[str, Any]) -> bool:
    return block.get("type") == "tool_use"


def _tool_names(body: dict[str, Any]) -> Iterator[str]:
    for tool in _list(body.get("tools")):
        if isinstance(tool, dict):
            inner = tool.get("function")
            found = inner if isinstance(inner, dict) else tool
            yield _clean(str(found.get("name") or found.get("type") or "?"))


def _bounded(entries: list[Any]) -> list[Any]:
    """The first two entries and as many of the last as fit, with a word on the gap."""
    sizes = [len(json.dumps(entry, ensure_ascii=False)) for entry in entries]
    if sum(sizes) <= MAX_REQUEST:
        return entries
    left = MAX_REQUEST - sum(sizes[:2])
    start = len(entries)
    while start > 2 and sizes[start - 1] <= left:
        start -= 1
        left -= sizes[start]
    note = f"… {start - 2} messages are left out here; the recording has them …"
    gap = [{"role": "system", "content": note}] if start > 2 else []
    return [*entries[:2], *gap, *entries[start:]]


def _clean(value: Any, depth: int = 0) -> Any:
    """A value that every database takes: bounded texts without lone surrogates and zeros."""
    if depth > MAX_DEPTH:
        return "…"
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            value = f"{value[:MAX_TEXT]}… ({len(value):,} characters in all)"
        return value.encode("utf-8", "replace").decode().replace("\0", "�")
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    return value


def _events(response: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events; what is cut off is left out."""
    for block in response.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
        if event := _object(b"\n".join(lines)):
            yield event


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _place(value: Any) -> int:
    return value if isinstance(value, int) else 0
