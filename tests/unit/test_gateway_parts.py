"""The parts of the gateway that need no server: prices, keys of requests, readers of answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sia.errors import ProviderError
from sia.gateway import Budget, ModelGateway, Price, Provider, Role, Route, Spend, Usage
from sia.gateway.matching import Digest, canonical, digest
from sia.gateway.recording import Recording, open_recording
from sia.gateway.store import Exchange, Store, read_exchanges, read_misses, read_spend
from sia.gateway.wire import CHAT, EMBEDDINGS, MESSAGES, RESPONSES, Format, Reader

KEY = "SIA_TEST_KEY"


def provider(**changes: Any) -> Provider:
    given: dict[str, Any] = {"name": "some", "base_url": "http://x/v1", "api_key_env": KEY}
    return Provider(**given | changes)


def test_a_cost_follows_the_price_of_each_kind_of_token() -> None:
    usage = Usage(input_tokens=1_000, cached_tokens=600, cache_write_tokens=100, output_tokens=10)
    price = Price(input=3, output=15, cached=0.3, cache_write=3.75)
    assert price.of(usage) == pytest.approx((300 * 3 + 600 * 0.3 + 100 * 3.75 + 150) / 1e6)
    assert Price(input=3, output=15).of(usage) == pytest.approx((3_000 + 150) / 1e6)


def test_a_price_is_that_of_the_id_or_of_the_id_without_its_date() -> None:
    prices = {
        "claude-sonnet-4-5": Price(input=3, output=15),
        "claude-sonnet-4": Price(input=1, output=1),
        "gpt-5": Price(input=2, output=2),
        "gpt-5-2025-08-07": Price(input=9, output=9),
    }
    some = provider(prices=prices)
    found = {
        "claude-sonnet-4-5": 3, "claude-sonnet-4-5-20250929": 3, "claude-sonnet-4-20250514": 1,
        "claude-sonnet-4-5@20250929": 3, "gpt-5": 2, "gpt-5-2025-08-07": 9, "gpt-5-2026-01-01": 2,
        "gpt-5-mini": None, "gpt-5-mini-2025-08-07": None, "gpt": None,
    }  # fmt: skip
    for model, price in found.items():
        cost = some.cost(model, Usage(input_tokens=1_000_000))
        assert cost == price, model


def test_a_key_that_is_missing_or_cannot_be_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ProviderError, match=rf"'some' needs its key in \${KEY}.*export {KEY}="):
        provider().key()
    monkeypatch.setenv(KEY, "sk-\u200b1")
    with pytest.raises(ProviderError, match="holds characters that no key has"):
        provider().key()
    monkeypatch.setenv(KEY, " sk-1\n")
    assert provider().key() == "sk-1"
    assert provider(api_key_env="").key() == ""


def test_a_provider_without_an_address_for_a_format_is_refused() -> None:
    with pytest.raises(ProviderError, match="speaks 'messages' but has no address for it"):
        provider(formats=("chat", "messages"))
    with pytest.raises(ProviderError, match=r"provider.formats has 'text'; known are chat,"):
        provider(formats=("text",))


def gateway(path: Path, **options: Any) -> ModelGateway:
    route = Route(provider=options.pop("provider", None) or provider(), model="m:free")
    return ModelGateway(store=path / "gateway.sqlite", routes={Role.TARGET: route}, **options)


def test_what_a_gateway_lacks_is_said_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    for mode in ("record", "live", "cache"):
        with pytest.raises(ProviderError, match=f"export {KEY}="):
            gateway(tmp_path, mode=mode)
    with pytest.raises(ProviderError, match=r"needs a recorded run: gateway.recording="):
        gateway(tmp_path, mode="replay")
    with pytest.raises(
        ProviderError, match=r"does not exist. Give the directory of a recorded run"
    ):
        gateway(tmp_path, mode="replay", recording=tmp_path)
    with pytest.raises(ProviderError, match=r"gateway.mode='reply' is none of record, live,"):
        gateway(tmp_path, mode="reply")
    monkeypatch.setenv(KEY, "k")
    with pytest.raises(ProviderError, match=r"needs the price of 'm:free'.*prices={m\\:free: {inp"):
        gateway(tmp_path, budget=Budget(usd=1))
    gateway(
        tmp_path,
        budget=Budget(usd=1),
        provider=provider(prices={"m:free": Price(input=0, output=0)}),
    )
    assert list(tmp_path.iterdir()) == []


def test_a_budget_says_what_was_spent() -> None:
    spent = Spend(calls=2, failed=1, input_tokens=10, output_tokens=5, cost_usd=0.01034)
    assert Budget(usd=0.01).refusal(spent) == "budget.usd=0.01 is used up ($0.0103 spent)"
    assert Budget(tokens=15).refusal(spent) == "budget.tokens=15 is used up (15 spent)"
    assert Budget(requests=3).refusal(spent) == "budget.requests=3 is used up (3 made)"
    assert "2 under way" in Budget(requests=5).refusal(spent, 2)
    assert Budget(usd=0.02, tokens=16, requests=4).refusal(spent) == ""
    assert Budget().refusal(spent) == ""


def request(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


ALIKE = {
    "user": (request("q", user="a"), request("q", user="b")),
    "metadata": (request("q", metadata={"user_id": "1"}), request("q")),
    "session": (request("q", session_id="1"), request("q", session_id="2")),
    "alias": (request("q"), request("q") | {"model": "alias"}),
    "cache markers": (
        {"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]},
        {"system": [{"type": "text", "text": "s"}]},
    ),
    "ids of tool calls": tuple(
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": f"{name}1", "type": "function", "function": {"name": "run"}},
                        {"id": f"{name}2", "type": "function", "function": {"name": "run"}},
                    ],
                },
                {"role": "tool", "tool_call_id": f"{name}1", "content": "ok"},
            ]
        }
        for name in ("pyd_ai_", "call_")
    ),
    "tool use": tuple(
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": name, "name": "Bash", "input": {}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": name}]},
            ]
        }
        for name in ("toolu_1", "toolu_2")
    ),
}
MOVING = {
    "uuid": (
        "id 0d9f3c0e-aa11-4b7e-9d27-5e3b8f1f9a10!",
        "id 99999999-0000-4b7e-9d27-5e3b8f1f9a10!",
    ),
    "hex": ("run 0123456789abcdef0123456789abcdef", "run fedcba9876543210fedcba9876543210"),
    "date": ("log\n2026-11-25 starts", "log\n2027-01-02 starts"),
    "time": ("at 2026-11-25T16:15:00.123Z it", "at 2026-11-26T01:02:03+01:00 it"),
    "ls": ("drwx 3 root 4096 Nov 25 16:10 .", "drwx 3 root 4096 Jan  2 09:01 ."),
    "date command": ("Wed Nov 25 17:02:32 UTC 2026\n", "Fri Jan  1 00:00:00 UTC 2027\n"),
    "today": ("Today's date is Tuesday the 3rd.\nGo", "Today's date is Friday the 13th.\nGo"),
    "kernel": ("OS Version: Linux 6.1.0\nGo", "OS Version: Linux 6.12.1-arch\nGo"),
    "temporary file": ("open a.py.tmp.6.0123456789ab", "open a.py.tmp.7.ba9876543210"),
    "marker": ("SIA_ATTEMPT=0a1b2c3d", "SIA_ATTEMPT=ffff0000"),
    "uid": ("uid=64100 gid=64100", "uid=64899 gid=64899"),
    "key": (f"key sia-{'0a' * 20}", f"key sia-{'1b' * 20}"),
}
DIFFERENT = {
    "text": (request("a"), request("b")),
    "system": ({"system": "a"}, {"system": "b"}),
    "temperature": (request("q", temperature=0), request("q", temperature=1)),
    "stream": (request("q"), request("q", stream=True)),
    "tools": (request("q", tools=[]), request("q", tools=[{"name": "x"}])),
    "number": (request("take 20261125 away"), request("take 20261126 away")),
    "which call": tuple(
        {
            "messages": [
                {"type": "tool_use", "id": "a"},
                {"type": "tool_use", "id": "b"},
                {"tool_use_id": answered},
            ]
        }
        for answered in ("a", "b")
    ),
    "user in text": (request("user"), request("users")),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_names_the_caller_or_links_calls_makes_no_difference(name: str) -> None:
    one, two = ALIKE[name]
    assert digest("chat", "m", one) == digest("chat", "m", two)


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_in_a_text_makes_a_difference_only_to_the_letter(name: str) -> None:
    one, two = (digest("chat", "m", request(text)) for text in MOVING[name])
    assert one.key == two.key
    assert one.exact != two.exact


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_changes_the_answer_makes_a_difference(name: str) -> None:
    one, two = DIFFERENT[name]
    assert digest("chat", "m", one).key != digest("chat", "m", two).key


def test_format_and_model_make_a_difference() -> None:
    keys = {
        digest(wire, model, request("q")).key
        for wire in ("chat", "messages")
        for model in ("gpt-5-2025-08-07", "gpt-5-2025-09-09")
    }
    assert len(keys) == 4


def test_a_tool_may_have_properties_with_any_name() -> None:
    names = ("type", "id", "call_id", "metadata", "user")
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    one = request("q", tools=[{"name": "t", "input_schema": schema}])
    fewer = {**schema, "properties": {"type": {"type": "string"}}}
    other = request("q", tools=[{"name": "t", "input_schema": fewer}])
    assert digest("chat", "m", one).key != digest("chat", "m", other).key


def test_half_a_character_can_be_digested() -> None:
    assert "\\ud800" in canonical(request("\ud800"))
    assert digest("chat", "m", request("\ud800")) != digest("chat", "m", request("\ud801"))


def exchange(store: Store, n: int, **changes: Any) -> Exchange:
    given: dict[str, Any] = {
        "id": 0, "session": store.session, "scope": "s", "role": Role.TARGET, "format": "chat",
        "provider": "p", "requested_model": "m", "model": "m", "served_model": "m", "key": "k",
        "exact": f"e{n}", "occurrence": n, "stream": False, "status": 200, "headers": {},
        "finish": "stop", "failure": "", "source": "", "input_tokens": n, "cached_tokens": 0,
        "cache_write_tokens": 0, "output_tokens": 1, "estimated": False, "counted": True,
        "cost_usd": 0.5, "attempts": 1, "started_at": 0.0, "wall_s": 0.1, "request_zlib": b"",
        "body_zlib": b"",
    }  # fmt: skip
    return Exchange(**given | changes)


def asked(recording: Recording, *exact: str, scope: str = "s", key: str = "k") -> list[int | None]:
    """Which answers come, by their count of input tokens."""
    found = [recording.find(scope, Digest(key=key, exact=one), "p") for one in exact]
    return [None if one is None else one.input_tokens for one in found]


def test_the_nth_request_gets_the_nth_answer_of_its_scope(tmp_path: Path) -> None:
    first = Store(tmp_path / "s", mode="record", now=0)
    for n in range(3):
        first.add(exchange(first, n))
    first.add(exchange(first, 3, failure="no"))
    first.add(exchange(first, 4, scope="other"))
    first.close()
    store = Store(tmp_path / "s", mode="record", now=0)
    store.add(exchange(store, 5))  # of this session: it has been given already
    again = Recording(store.reader, tmp_path / "s", "store", before=store.session)
    assert asked(again, "x", "x", "x", "x") == [0, 1, 2, None]
    assert asked(again, "x", scope="nowhere") == [None]
    assert asked(again, "x", key="unknown") == [None]
    store.close()


def test_an_answer_to_the_same_letters_comes_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", mode="record", now=0)
    for n in range(4):
        store.add(exchange(store, n))
    store.close()
    recording = open_recording(tmp_path / "s")
    assert asked(recording, "e2", "x", "e1", "x", "x") == [2, 0, 1, 3, None]
    recording.close()


def test_a_replay_gives_what_the_last_session_of_a_step_was_given(tmp_path: Path) -> None:
    first = Store(tmp_path / "s", mode="record", now=0)
    first.add(exchange(first, 0, failure="cut off"))
    first.add(exchange(first, 1))
    first.add(exchange(first, 2))
    first.add(exchange(first, 9, scope="done in the first session"))
    first.close()
    last = Store(tmp_path / "s", mode="record", now=0)
    last.add(exchange(last, 1, occurrence=0, source="store"))
    last.add(exchange(last, 7, occurrence=2, failure="refused"))
    last.add(exchange(last, 6, occurrence=1))
    last.close()
    recording = open_recording(tmp_path / "s")
    # The last session's own three in the order of its requests, then what it had not repeated.
    assert asked(recording, "x", "x", "x", "x", "x") == [1, 6, 7, 2, None]
    assert asked(recording, "x", scope="done in the first session") == [9]
    recording.close()


def test_a_cache_answers_every_scope_and_only_for_its_provider(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", mode="cache", now=0)
    store.add(exchange(store, 0))
    store.add(exchange(store, 1, scope="b", provider="another"))
    cache = Recording(store.reader, tmp_path / "s", "cache")
    assert asked(cache, "x", "x", scope="a") == [0, None]
    assert asked(cache, "x", scope="c") == [0]
    store.close()


def test_a_store_adds_up_what_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert (read_spend(path), list(read_exchanges(path)), read_misses(path)) == ({}, [], [])
    store = Store(path, mode="record", now=0)
    assert read_spend(path) == {}
    store.add(exchange(store, 10))
    store.add(exchange(store, 20, failure="empty", cost_usd=None, cached_tokens=5))
    store.add(exchange(store, 40, source="store", cost_usd=0.0))
    store.add(exchange(store, 80, counted=False))
    store.add(exchange(store, 7, role=Role.META))
    store.close()
    spent = read_spend(path)
    assert spent[Role.TARGET] == Spend(
        calls=1, failed=1, replayed=1, input_tokens=30, cached_tokens=5, output_tokens=2,
        cost_usd=0.5, unpriced=1,
    )  # fmt: skip
    assert spent[Role.META].input_tokens == 7
    total: dict[Role, Spend] = {}
    for one in read_exchanges(path):
        total[one.role] = total.get(one.role, Spend()) + one.spend()
    assert total == spent


def events(*data: Mapping[str, Any] | str) -> bytes:
    return b"".join(
        b"data: " + (one if isinstance(one, str) else json.dumps(one)).encode() + b"\n\n"
        for one in data
    )


USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14,
         "prompt_tokens_details": {"cached_tokens": 6}}  # fmt: skip
STARTED = {"type": "message_start", "message": {
    "model": "m-1", "content": [], "stop_reason": None,
    "usage": {"input_tokens": 2, "cache_read_input_tokens": 6, "cache_creation_input_tokens": 2,
              "output_tokens": 1}}}  # fmt: skip
STREAMS: dict[str, tuple[Format, bytes]] = {
    "chat": (CHAT, events(
        {"model": "m-1", "choices": [{"delta": {"content": "good"}}]},
        {"model": "m-1", "choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"model": "m-1", "choices": [], "usage": USAGE}, "[DONE]")),
    "chat without [DONE]": (CHAT, events(
        {"model": "m-1", "choices": [{"delta": {"content": "good"}, "finish_reason": "stop"}],
         "usage": USAGE})),
    "responses": (RESPONSES, events(
        {"type": "response.created", "response": {"model": "m-1", "status": "in_progress"}},
        {"type": "response.output_text.delta", "delta": "good"},
        {"type": "response.completed", "response": {
            "model": "m-1", "status": "completed", "output": [{"text": "good"}], "usage": {
                "input_tokens": 10, "input_tokens_details": {"cached_tokens": 6},
                "output_tokens": 4}}})),
    "messages": (MESSAGES, events(
        STARTED, {"type": "ping"},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "good"}},
        {"type": "message_delta", "delta": {"stop_reason": "stop"}, "usage": {"output_tokens": 4}},
        {"type": "message_stop"})),
}  # fmt: skip


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_read_however_it_is_cut(name: str, size: int, ending: bytes) -> None:
    wire, stream = STREAMS[name]
    stream = stream.replace(b"\n", ending)
    reader = Reader(wire)
    out = b"".join(reader.feed(stream[at : at + size]) for at in range(0, len(stream), size))
    assert out + reader.finish_stream() == stream
    assert (reader.failure, reader.model) == ("", "m-1")
    written = 2 if wire is MESSAGES else 0
    assert reader.usage == Usage(
        input_tokens=10, cached_tokens=6, cache_write_tokens=written, output_tokens=4
    )
    assert reader.finish == ("completed" if wire is RESPONSES else "stop")


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_ends_early_is_a_failure_and_no_torn_event_goes_on(name: str) -> None:
    wire, stream = STREAMS[name]
    at = stream.index(b"stop" if wire is not RESPONSES else b"response.completed")
    reader = Reader(wire)
    out = reader.feed(stream[:at])
    assert out == stream[: len(out)]
    assert out == b"" or out.endswith(b"\n\n")
    assert b"\n\n" not in stream[len(out) : at]
    assert reader.finish_stream() == b""
    assert reader.failure


WRONG = {
    "no choices": (CHAT, {"choices": []}, "the answer is empty: no choices"),
    "no content": (MESSAGES, {"type": "message", "content": []}, "the answer is empty: no content"),
    "no output": (RESPONSES, {"status": "completed", "output": []}, "is empty: no output"),
    "no data": (EMBEDDINGS, {"data": []}, "the answer is empty: no data"),
    "a list": (CHAT, [1], "the answer is not a JSON object"),
    "an error": (CHAT, {"error": {"message": "busy"}}, "the provider says: busy"),
    "failed": (
        RESPONSES, {"status": "failed", "error": {"message": "odd"}, "output": []},
        "the provider says: odd",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_of_no_use_has_a_reason(name: str) -> None:
    wire, body, reason = WRONG[name]
    reader = Reader(wire)
    reader.whole(json.dumps(body).encode())
    assert reason in reader.failure


def test_reasoning_that_is_only_in_the_total_counts_as_output() -> None:
    reader = Reader(CHAT)
    usage = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 50}
    reader.whole(json.dumps({"choices": [{}], "usage": usage}).encode())
    assert reader.usage == Usage(input_tokens=10, output_tokens=40)


def test_an_error_within_a_stream_is_the_vendors_own() -> None:
    reader = Reader(MESSAGES)
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assert reader.feed(events(STARTED, error)) == events(STARTED, error)
    assert (reader.failure, reader.told) == ("the provider says: Overloaded", True)
