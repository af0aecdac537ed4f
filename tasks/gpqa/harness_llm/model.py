"""A client for the one model that a target may ask; the standard library alone.

The same file in every language-model harness of SIA: a harness is copied and evolves on its own, so
it takes what it needs along.
"""

import http.client
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]

MAX_REPLY_BYTES = 4 * 2**20
MAX_ERROR_CHARS = 300
PROGRESS_S = 15.0


class NoModel(Exception):
    """There is nobody to ask, or nobody answers."""


class Refused(Exception):
    """The budget of the run is used up: no call will be answered any more."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of one call.

    Attributes:
        text: What the model said; empty if the call failed.
        error: Why there is no text; empty if there is one.
        cut: The text ends where max_tokens was reached.
        choice: The first choice as the endpoint sent it, for what only some endpoints give.
    """

    text: str = ""
    error: str = ""
    cut: bool = False
    choice: Mapping[str, Any] = field(default_factory=dict)


class Model:
    """Asks a chat model; a failed call is a reply with an error, never an exception.

    Args:
        concurrency: Calls in flight at once.
        timeout_s: For one call. A call that times out is not repeated: it may have been paid for.
        retries: After a lost connection, a 429 or a 5xx, unless the answer forbids it.
        give_up_after: Calls that fail in a row before no more are made; the rest counts as failed.
        ask_s: Seconds for all calls of `ask_all`; what is not asked by then counts as failed.
        max_tokens: Of one answer; None leaves it to the endpoint.
        temperature: None leaves it to the endpoint.
        backoff_s: Before the first retry; twice that before the second.
        extra: Further fields of every request, such as max_completion_tokens or reasoning_effort.

    Raises:
        NoModel: The environment names no endpoint.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        timeout_s: float,
        retries: int,
        give_up_after: int,
        ask_s: float,
        max_tokens: int | None,
        temperature: float | None,
        backoff_s: float = 1.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        missing = [v for v in ("OPENAI_BASE_URL", "SIA_MODEL") if not os.environ.get(v)]
        if missing:
            raise NoModel(f"no model to ask: {' and '.join(missing)} not set (target.model=...)")
        self._url = os.environ["OPENAI_BASE_URL"].rstrip("/") + "/chat/completions"
        self._headers = {
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
            "Content-Type": "application/json",
        }
        settings = {"max_tokens": max_tokens, "temperature": temperature, **(extra or {})}
        self._fields = {
            "model": os.environ["SIA_MODEL"],
            **{name: value for name, value in settings.items() if value is not None},
        }
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._give_up_after = give_up_after
        self._ask_s = ask_s
        self.errors: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._answered = 0
        self._failed_in_a_row = 0
        self._lock = threading.Lock()

    def ask_all(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        each: Callable[[int, Reply], None] = lambda number, reply: None,
    ) -> list[Reply]:
        """A reply to every prompt, in their order; calls begin in that order, too.

        Args:
            prompts: Messages of each call.
            each: Is told the number and the reply of each call as it ends, in the calling thread.

        Raises:
            NoModel: No call at all was answered.
            Refused: One was refused for lack of budget. Calls in flight are left to themselves.
        """
        began = time.monotonic()
        numbers = iter(range(len(prompts)))
        taking = threading.Lock()
        ended: queue.SimpleQueue[tuple[int, Reply | Exception]] = queue.SimpleQueue()

        def work() -> None:
            while True:
                with taking:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    ended.put((number, self._ask_in_time(prompts[number], began)))
                except Exception as error:  # raised where somebody can see it
                    ended.put((number, error))
                    return

        # Daemons: a refusal ends the program without waiting for what is in flight.
        for _ in range(min(self._concurrency, len(prompts))):
            threading.Thread(target=work, daemon=True).start()
        replies = [Reply()] * len(prompts)
        said = began
        for count in range(1, len(prompts) + 1):
            number, reply = ended.get()
            if isinstance(reply, Exception):
                raise reply
            replies[number] = reply
            each(number, reply)
            if count == len(prompts) or time.monotonic() > said + PROGRESS_S:
                said = time.monotonic()
                self.say(f"{count}/{len(prompts)} calls, {said - began:.0f} s")
        if prompts and not self._answered:
            raise NoModel(f"no call was answered: {self._faults()}")
        return replies

    def ask(self, messages: Sequence[Message]) -> Reply:
        """One reply.

        Raises:
            Refused: There is no budget left.
        """
        body = json.dumps({**self._fields, "messages": list(messages)}).encode()
        reply, again = self._call(body)
        for attempt in range(self._retries):
            if not again:
                break
            time.sleep(self._backoff_s * 2**attempt)
            reply, again = self._call(body)
        with self._lock:
            if reply.error:
                self.errors[reply.error] += 1
                self._failed_in_a_row += 1
            else:
                self._answered += 1
                self._failed_in_a_row = 0
        return reply

    def say(self, text: str) -> None:
        """Prints a line on stderr, with the tokens used and the calls that failed."""
        tokens = f"{self.tokens['in']} tokens in, {self.tokens['out']} out"
        faults = f"; failed: {self._faults()}" if self.errors else ""
        print(f"{text}; {tokens}{faults}", file=sys.stderr, flush=True)

    def _ask_in_time(self, messages: Sequence[Message], began: float) -> Reply:
        reason = ""
        if self._failed_in_a_row >= self._give_up_after:
            reason = f"not asked: {self._give_up_after} calls in a row had failed"
        elif time.monotonic() > began + self._ask_s:
            reason = f"not asked: {self._ask_s:g} s were over"
        if not reason:
            return self.ask(messages)
        with self._lock:
            self.errors[reason] += 1
        return Reply(error=reason)

    def _call(self, body: bytes) -> tuple[Reply, bool]:
        """One exchange, and whether it may be tried again."""
        request = urllib.request.Request(self._url, body, self._headers)
        until = time.monotonic() + self._timeout_s
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return self._read(_body(response, until)), False
        except urllib.error.HTTPError as error:
            with error:
                detail = _detail(error)
            if error.code == 402:
                raise Refused(detail) from None
            again = error.code == 429 or error.code >= 500
            forbidden = (error.headers.get("x-should-retry") or "").lower() == "false"
            return Reply(error=f"HTTP {error.code}: {detail}"), again and not forbidden
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                return Reply(error=f"no answer within {self._timeout_s:g} s"), False
            return Reply(error=f"connection lost: {reason or type(reason).__name__}"), True

    def _read(self, body: bytes) -> Reply:
        """The reply in the body of a good answer; a malformed one is not worth a second payment."""
        if len(body) > MAX_REPLY_BYTES:
            return Reply(error=f"an answer of more than {MAX_REPLY_BYTES} bytes")
        try:
            answer = json.loads(body)
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            usage = answer.get("usage") or {}
            with self._lock:
                self.tokens["in"] += int(usage.get("prompt_tokens") or 0)
                self.tokens["out"] += int(usage.get("completion_tokens") or 0)
        except (ValueError, LookupError, TypeError, AttributeError):
            return Reply(error="an answer that is not a chat completion")
        if not isinstance(text, str):
            return Reply(error="an answer without text", choice=choice)
        # A lone surrogate is legal JSON and cannot be written to a file.
        clean = text.encode("utf-8", "replace").decode()
        return Reply(text=clean, cut=choice.get("finish_reason") == "length", choice=choice)

    def _faults(self) -> str:
        with self._lock:
            common = self.errors.most_common(5)
        return ", ".join(f"{count} x {reason}" for reason, count in common)


def _body(response: http.client.HTTPResponse, until: float) -> bytes:
    """Reads no longer than a moment past `until` and little more than the allowed size."""
    parts: list[bytes] = []
    while sum(map(len, parts)) <= MAX_REPLY_BYTES and (part := response.read1(2**16)):
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError
    return b"".join(parts)


def _detail(error: urllib.error.HTTPError) -> str:
    """What the answer says about its error, in one line."""
    try:
        text = error.read(2**16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:MAX_ERROR_CHARS] or str(error.reason)
