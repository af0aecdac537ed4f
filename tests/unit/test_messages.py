"""Recorded calls as messages: three wire formats, whole and streamed, sound and broken."""

import json
from typing import Any

import pytest

from sia.gateway.scripted import formats
from sia.gateway.scripted.rules import Reply
from sia.tracking.messages import MAX_DEPTH, MAX_REQUEST, MAX_TEXT, conversation

REPLY = Reply(
    text="I write the file. 精确",
    calls=(("Write", {"path": "a.txt", "content": "{x}\n"}), ("Bash", {"command": "ls"})),
    input_tokens=5,
    output_tokens=3,
    cached_tokens=0,
)
REST = "the recording has them …"
CALL = {"name": "Bash", "arguments": '{"command": "ls"}'}
REQUESTS: dict[str, dict[str, Any]] = {
    "chat": {
        "model": "m",
        "temperature": 0.5,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "List the files."}]},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "1", "type": "function", "function": CALL}]},
            {"role": "tool", "tool_call_id": "1", "content": "a.txt"},
        ],
        "tools": [{"type": "function", "function": {"name": "Bash"}}],
    },
    "messages": {
        "model": "m",
        "temperature": 0.5,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "List the files."},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "1", "name": "Bash", "input": {"command": "ls"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "a.txt"}]},
        ],
        "tools": [{"name": "Bash", "input_schema": {}}],
    },
    "responses": {
        "model": "m",
        "temperature": 0.5,
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
            {"type": "function_call", "call_id": "1", **CALL},
            {"type": "function_call_output", "call_id": "1", "output": "a.txt"},
        ],
        "tools": [{"type": "function", "name": "Bash"}],
    },
}  # fmt: skip


def answer(format: str, *, stream: bool) -> bytes:
    body = REQUESTS[format]
    if stream:
        return b"".join(formats.stream(format, body, REPLY, "id"))
    return json.dumps(formats.whole(format, body, REPLY, "id")).encode()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("format", ["chat", "messages", "responses"])
def test_every_format_reads_alike(format: str, stream: bool) -> None:
    told = conversation(format, REQUESTS[format], answer(format, stream=stream))
    system, user, assistant, tool = told.inputs["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["role"] == "user"
    assert assistant["tool_calls"] == [{"id": "1", "type": "function", "function": CALL}]
    assert tool == {"role": "tool", "tool_call_id": "1", "content": "a.txt"}
    assert told.inputs["temperature"] == 0.5
    assert told.prompt == "List the files."
    assert told.tools == ("Bash",)
    (choice,) = told.outputs["choices"]
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", REPLY.text)
    said = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in
            message["tool_calls"]]  # fmt: skip
    assert said == list(REPLY.calls)
    assert choice["finish_reason"] == "tool_calls"
    assert told.reply.splitlines()[0] == REPLY.text
    assert told.reply.splitlines()[2].startswith("Bash(")


@pytest.mark.parametrize("format", ["chat", "messages", "responses"])
def test_a_stream_that_breaks_keeps_what_came(format: str) -> None:
    whole = answer(format, stream=True)
    for size in range(0, len(whole), 7):
        told = conversation(format, REQUESTS[format], whole[:size])
        for choice in told.outputs.get("choices", []):
            assert REPLY.text.startswith(choice["message"]["content"])
    assert told.outputs["choices"]


@pytest.mark.parametrize("format", ["chat", "messages", "responses", "embeddings", "new"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[1]", b'{"choices": [{', b"\xff\xfe", b"data: {\n\n", b"[" * 100_000,
        b'{"choices": [1, {"message": 3}, {"message": {"content": [{"text": 5}]}}]}',
        b'{"choices": [{"message": {"content": "x", "tool_calls": 1}}]}',
        b'{"content": [1, {"type": "tool_use"}], "stop_reason": {}}',
        b'{"output": [1, {"type": "message", "content": 4}, {"type": "function_call"}]}',
        b'data: {"choices": [{"index": "x", "delta": {"tool_calls": [{"function": 1}, 2]}}]}\n\n',
        b'data: {"type": "content_block_start", "index": 0, "content_block": {"type": "text"}}\n\n',
    ],
)  # fmt: skip
@pytest.mark.parametrize("request_", [None, [], {"messages": 3, "input": {}, "tools": [1, {}]}])
def test_nothing_that_is_recorded_breaks_the_reading(
    format: str, body: bytes, request_: object
) -> None:
    json.dumps(vars(conversation(format, request_, body)))


def test_an_error_of_the_vendor_is_shown() -> None:
    told = conversation("messages", {}, b'{"type": "error", "error": {"message": "overloaded"}}')
    assert told.outputs == {"error": {"message": "overloaded"}}
    stream = b'event: error\ndata: {"type": "error", "error": {"message": "overloaded"}}\n\n'
    assert conversation("chat", {}, stream).outputs == {"error": {"message": "overloaded"}}


def test_texts_that_a_database_refuses_are_mended() -> None:
    body = json.dumps({"choices": [{"message": {"content": "half \ud800 zero \0"}}]}).encode()
    assert conversation("chat", {}, body).reply == "half ? zero �"


def test_long_texts_and_long_conversations_are_cut_in_the_middle() -> None:
    turns = [{"role": "user", "content": f"{k}: " + "x" * 4_000} for k in range(40)]
    turns[5]["content"] = "y" * 3 * MAX_TEXT
    told = conversation("chat", {"messages": turns}, b"")
    kept = told.inputs["messages"]
    assert len(json.dumps(kept)) < MAX_REQUEST + 1_000
    assert [entry["content"][:3] for entry in kept[:2]] == ["0: ", "1: "]
    assert kept[2]["content"] == f"… {40 + 1 - len(kept)} messages are left out here; {REST}"
    assert kept[-1]["content"].startswith("39: ")
    alone = conversation("chat", {"messages": turns[5:6]}, b"").inputs["messages"][0]["content"]
    assert alone.endswith(f"… ({3 * MAX_TEXT:,} characters in all)")


def test_deep_values_end_somewhere() -> None:
    deep: Any = "x"
    for _ in range(10 * MAX_DEPTH):
        deep = [deep]
    told = conversation("chat", {"messages": [{"role": "user", "content": deep}]}, b"")
    assert "…" in json.dumps(told.inputs, ensure_ascii=False)


def test_embeddings_are_counted_not_copied() -> None:
    body = {"model": "m", "input": ["a", "b"]}
    reply = json.dumps(formats.whole("embeddings", body, REPLY, "id")).encode()
    told = conversation("embeddings", body, reply)
    assert told.inputs == {"model": "m", "input": ["a", "b"]}
    assert told.outputs == {"embeddings": 2}
