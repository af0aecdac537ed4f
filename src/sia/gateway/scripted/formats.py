"""Requests and answers in the wire formats of OpenAI and Anthropic, streams included.

chat        POST /v1/chat/completions
responses   POST /v1/responses
messages    POST /v1/messages
embeddings  POST /v1/embeddings
"""

import base64
import hashlib
import json
import struct
from collections.abc import Iterator
from typing import Any

from sia.gateway.scripted.rules import Asked, Reply

DIMENSIONS = 16  # of an embedding
PIECE = 20  # characters in one event of a stream


def asked(kind: str, body: dict[str, Any]) -> Asked:
    """What a request of format `kind` asks."""
    if kind == "messages":
        lines = [_text(body.get("system", "")), *map(_message, body.get("messages", []))]
        entries = body.get("messages", [])
        tools = [tool.get("name", "") for tool in body.get("tools", [])]
    elif kind == "responses":
        entries = body.get("input", [])
        if isinstance(entries, str):
            entries = [{"role": "user", "content": entries}]
        lines = [_text(body.get("instructions") or ""), *map(_message, entries)]
        tools = [tool.get("name", "") for tool in body.get("tools") or []]
    elif kind == "embeddings":
        given = body.get("input", [])
        entries, tools = [], []
        lines = [given] if isinstance(given, str) else [str(text) for text in given]
    else:
        entries = body.get("messages", [])
        lines = [_message(entry) for entry in entries]
        tools = [tool.get("function", {}).get("name", "") for tool in body.get("tools") or []]
    turns = _turns(entries)
    return Asked(
        model=str(body.get("model", "")),
        texts=tuple(lines),
        turns=turns,
        tools=tuple(tools),
        embeddings=kind == "embeddings",
    )


def whole(kind: str, body: dict[str, Any], reply: Reply, identity: str) -> dict[str, Any]:
    """The answer as one JSON object."""
    model = body.get("model", "")
    if kind == "embeddings":
        return _embeddings(body, reply)
    if kind == "messages":
        content: list[dict[str, Any]] = [{"type": "text", "text": reply.text}] if reply.text else []
        content += [
            {"type": "tool_use", "id": f"toolu_{identity}{k}", "name": name, "input": arguments}
            for k, (name, arguments) in enumerate(reply.calls)
        ]
        return {
            "id": f"msg_{identity}", "type": "message", "role": "assistant", "model": model,
            "content": content, "stop_reason": "tool_use" if reply.calls else "end_turn",
            "stop_sequence": None, "usage": _anthropic_usage(reply),
        }  # fmt: skip
    if kind == "responses":
        output: list[dict[str, Any]] = []
        if reply.text or not reply.calls:
            part = {"type": "output_text", "text": reply.text, "annotations": []}
            output.append(
                {"type": "message", "id": f"msg_{identity}", "status": "completed",
                 "role": "assistant", "content": [part]}
            )  # fmt: skip
        output += [
            {"type": "function_call", "id": f"fc_{identity}{k}", "call_id": f"call_{identity}{k}",
             "name": name, "arguments": json.dumps(arguments), "status": "completed"}
            for k, (name, arguments) in enumerate(reply.calls)
        ]  # fmt: skip
        return {
            "id": f"resp_{identity}", "object": "response", "created_at": 0, "status": "completed",
            "model": model, "output": output, "parallel_tool_calls": True, "tool_choice": "auto",
            "tools": [], "error": None, "incomplete_details": None, "instructions": None,
            "metadata": {},
            "usage": {
                "input_tokens": reply.input_tokens,
                "input_tokens_details": {"cached_tokens": reply.cached_tokens},
                "output_tokens": reply.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": reply.input_tokens + reply.output_tokens,
            },
        }  # fmt: skip
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = [
            {"id": f"call_{identity}{k}", "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments)}}
            for k, (name, arguments) in enumerate(reply.calls)
        ]  # fmt: skip
    elif not reply.text:
        message["content"] = ""
    finish = "tool_calls" if reply.calls else "stop"
    return {
        "id": f"chatcmpl-{identity}", "object": "chat.completion", "created": 0, "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": _openai_usage(reply),
    }  # fmt: skip


def stream(kind: str, body: dict[str, Any], reply: Reply, identity: str) -> Iterator[bytes]:
    """The answer as server-sent events."""
    answer = whole(kind, body, reply, identity)
    if kind == "messages":
        yield from _messages_stream(answer, reply)
    elif kind == "responses":
        yield from _responses_stream(answer)
    else:
        yield from _chat_stream(body, answer, reply)


def error(kind: str, status: int, message: str) -> dict[str, Any]:
    """An error in the shape of the format."""
    if kind == "messages":
        return {"type": "error", "error": {"type": "api_error", "message": message}}
    return {"error": {"message": message, "type": "scripted", "param": None, "code": status}}


def _chat_stream(body: dict[str, Any], answer: dict[str, Any], reply: Reply) -> Iterator[bytes]:
    message = answer["choices"][0]["message"]

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _data({**head, "choices": [choice]})

    head = {
        "id": answer["id"], "object": "chat.completion.chunk", "created": 0,
        "model": answer["model"],
    }  # fmt: skip
    yield chunk({"role": "assistant", "content": ""})
    for piece in _pieces(message["content"] or ""):
        yield chunk({"content": piece})
    for k, call in enumerate(message.get("tool_calls", [])):
        function = call["function"]
        opening = {"name": function["name"], "arguments": ""}
        yield chunk({"tool_calls": [{"index": k, **call, "function": opening}]})
        for piece in _pieces(function["arguments"]):
            yield chunk({"tool_calls": [{"index": k, "function": {"arguments": piece}}]})
    yield chunk({}, answer["choices"][0]["finish_reason"])
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _data({**head, "choices": [], "usage": _openai_usage(reply)})
    yield b"data: [DONE]\n\n"


def _messages_stream(answer: dict[str, Any], reply: Reply) -> Iterator[bytes]:
    def event(name: str, /, **fields: Any) -> bytes:
        return _event(name, {"type": name, **fields})

    usage = {**_anthropic_usage(reply), "output_tokens": 1}
    opening = {**answer, "content": [], "stop_reason": None, "usage": usage}
    yield event("message_start", message=opening)
    yield event("ping")
    for index, block in enumerate(answer["content"]):
        if block["type"] == "text":
            empty, deltas = {**block, "text": ""}, [
                {"type": "text_delta", "text": piece} for piece in _pieces(block["text"])
            ]  # fmt: skip
        else:
            empty, deltas = {**block, "input": {}}, [
                {"type": "input_json_delta", "partial_json": piece}
                for piece in _pieces(json.dumps(block["input"]))
            ]  # fmt: skip
        yield event("content_block_start", index=index, content_block=empty)
        for delta in deltas:
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    ending = {"stop_reason": answer["stop_reason"], "stop_sequence": None}
    yield event("message_delta", delta=ending, usage={"output_tokens": reply.output_tokens})
    yield event("message_stop")


def _responses_stream(answer: dict[str, Any]) -> Iterator[bytes]:
    number = -1

    def event(name: str, /, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return _event(name, {"type": name, "sequence_number": number, **fields})

    opening = {**answer, "status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=opening)
    for index, item in enumerate(answer["output"]):
        place = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            part = item["content"][0]
            started = {**item, "status": "in_progress", "content": []}
            yield event("response.output_item.added", output_index=index, item=started)
            empty = {**part, "text": ""}
            yield event("response.content_part.added", **place, content_index=0, part=empty)
            for piece in _pieces(part["text"]):
                yield event(
                    "response.output_text.delta", **place, content_index=0, delta=piece, logprobs=[]
                )
            text = part["text"]
            yield event(
                "response.output_text.done", **place, content_index=0, text=text, logprobs=[]
            )
            yield event("response.content_part.done", **place, content_index=0, part=part)
        else:
            started = {**item, "status": "in_progress", "arguments": ""}
            yield event("response.output_item.added", output_index=index, item=started)
            for piece in _pieces(item["arguments"]):
                yield event("response.function_call_arguments.delta", **place, delta=piece)
            arguments = item["arguments"]
            yield event(
                "response.function_call_arguments.done",
                **place, name=item["name"], arguments=arguments,
            )  # fmt: skip
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.completed", response=answer)


def _embeddings(body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    given = body.get("input", [])
    texts = [given] if isinstance(given, str) else list(given)
    vectors: list[Any] = []
    for text in texts:
        digest = hashlib.sha256(str(text).encode("utf-8", "replace")).digest()[:DIMENSIONS]
        vector = [byte / 255 - 0.5 for byte in digest]
        packed = struct.pack(f"<{DIMENSIONS}f", *vector)
        base = body.get("encoding_format") == "base64"
        vectors.append(base64.b64encode(packed).decode() if base else vector)
    return {
        "object": "list",
        "model": body.get("model", ""),
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": reply.input_tokens, "total_tokens": reply.input_tokens},
    }


def _openai_usage(reply: Reply) -> dict[str, Any]:
    return {
        "prompt_tokens": reply.input_tokens,
        "completion_tokens": reply.output_tokens,
        "total_tokens": reply.input_tokens + reply.output_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
    }


def _anthropic_usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.input_tokens - reply.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reply.cached_tokens,
        "output_tokens": reply.output_tokens,
    }


def _turns(entries: list[dict[str, Any]]) -> int:
    """Answers of the assistant; consecutive entries of the responses format are one answer."""
    turns, before = 0, False
    for entry in entries:
        own = entry.get("role") == "assistant" or entry.get("type") in (
            "function_call",
            "reasoning",
        )
        turns += own and not before
        before = own
    return turns


def _message(entry: dict[str, Any]) -> str:
    parts = [_text(entry.get("content") or ""), _text(entry.get("output") or "")]
    for call in entry.get("tool_calls") or []:
        parts.append(str(call.get("function", {}).get("arguments", "")))
    return "\n".join(filter(None, parts))


def _text(content: Any) -> str:
    """The readable part of a message's content."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict):
            continue
        if "text" in part:
            texts.append(str(part["text"]))
        elif part.get("type") == "tool_result":
            texts.append(_text(part.get("content") or ""))
        elif part.get("type") == "tool_use":
            texts.append(json.dumps(part.get("input", {}), ensure_ascii=False))
    return "\n".join(texts)


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]


def _data(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\n".encode() + _data(data)
