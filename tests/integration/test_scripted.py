"""The scripted endpoint speaks the vendors' formats: their own SDKs understand it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sia.errors import ConfigError
from sia.gateway.scripted import Scripted, read_rules, serving

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

RULES = [
    {"when": {"last": r"weather in (\w+)"}, "say": "It rains in <<1>>.", "usage": {"output": 7}},
    {"when": {"text": "write", "turn": 0}, "write": {"path": "a.txt", "text": "{x}\n"}},
    {"when": {"text": "write", "turn": 1}, "say": "written"},
    {"when": {"text": "once", "times": 1}, "say": "first"},
    {"when": {"text": "once"}, "say": "again"},
    {"when": {"text": "fails"}, "fault": "status", "status": 503, "retry_after": 1},
]
WRITE = {"type": "object", "properties": {"path": {}, "content": {}}}
CHAT_TOOL = {"type": "function", "function": {"name": "write_file", "parameters": WRITE}}
RESPONSES_TOOL = {"type": "function", "name": "write_file", "parameters": WRITE, "strict": False}
MESSAGES_TOOL = {"name": "Write", "input_schema": WRITE}


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with serving(RULES) as server:
        yield server


@pytest.fixture
def oai(scripted: Scripted) -> Iterator[object]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
def ant(scripted: Scripted) -> Iterator[object]:
    with anthropic.Anthropic(base_url=scripted.url, api_key="k", max_retries=0) as client:
        yield client


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat_answers_with_text_and_usage(oai) -> None:
    answer = oai.chat.completions.create(model="m", messages=user("weather in Rome"))
    assert answer.choices[0].message.content == "It rains in Rome."
    assert answer.usage.completion_tokens == 7
    assert answer.model == "m"


def test_chat_streams_the_same_text_and_the_usage_on_request(oai) -> None:
    chunks = list(
        oai.chat.completions.create(
            model="m",
            messages=user("weather in Rome"),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "It rains in Rome."
    assert chunks[-1].usage.completion_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_the_tool_that_is_offered(oai, stream: bool) -> None:
    answer = oai.responses.create(model="m", input="write", tools=[RESPONSES_TOOL], stream=stream)
    if stream:
        answer = list(answer)[-1].response
    (call,) = answer.output
    assert call.name == "write_file"
    assert json.loads(call.arguments) == {"path": "a.txt", "content": "{x}\n"}
    done = oai.responses.create(
        model="m",
        input=[
            *user("write"),
            {"type": "function_call", "call_id": call.call_id, "name": call.name,
             "arguments": call.arguments},
            {"type": "function_call_output", "call_id": call.call_id, "output": "ok"},
        ],
    )  # fmt: skip
    assert done.output_text == "written"


def test_chat_calls_the_tool_that_is_offered(oai) -> None:
    answer = oai.chat.completions.create(model="m", messages=user("write"), tools=[CHAT_TOOL])
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"path": "a.txt", "content": "{x}\n"}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_messages_stream_text_and_tool_calls(ant) -> None:
    with ant.messages.stream(
        model="m", max_tokens=9, messages=user("write"), tools=[MESSAGES_TOOL]
    ) as stream:
        answer = stream.get_final_message()
    (call,) = answer.content
    assert (call.name, call.input) == ("Write", {"file_path": "a.txt", "content": "{x}\n"})
    assert answer.stop_reason == "tool_use"
    answer = ant.messages.create(
        model="m",
        max_tokens=9,
        messages=[
            *user("write"),
            {"role": "assistant", "content": answer.content},
            {"role": "user",
             "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "ok"}]},
        ],
    )  # fmt: skip
    assert answer.content[0].text == "written"


def test_a_rule_can_fit_a_number_of_times(ant) -> None:
    said = [
        ant.messages.create(model="m", max_tokens=9, messages=user("once")).content[0].text
        for _ in range(3)
    ]
    assert said == ["first", "again", "again"]


def test_embeddings_depend_on_the_text_alone(oai) -> None:
    a, b = (oai.embeddings.create(model="m", input=["x", "y"]).data for _ in range(2))
    assert a[0].embedding == pytest.approx(b[0].embedding)
    assert a[0].embedding != a[1].embedding


def test_a_status_comes_with_its_retry_after(ant) -> None:
    with pytest.raises(anthropic.InternalServerError) as error:
        ant.messages.create(model="m", max_tokens=9, messages=user("fails"))
    assert error.value.response.headers["retry-after"] == "1"


def test_what_no_rule_fits_is_an_error_that_says_so(oai) -> None:
    with pytest.raises(openai.BadRequestError, match="no rule of the script fits"):
        oai.chat.completions.create(model="m", messages=user("hello"))


def test_a_script_with_an_unknown_fault_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("- {fault: hangs}\n")
    with pytest.raises(ConfigError, match="fault='hangs' is none of hang, status"):
        read_rules(script)


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("- {say: hello}\n")
    argv = [sys.executable, "-m", "sia.gateway.scripted", str(script), "--port", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client:
            answer = client.chat.completions.create(model="m", messages=user("?"))
        assert answer.choices[0].message.content == "hello"
        process.terminate()
        assert process.wait(20) == 0
