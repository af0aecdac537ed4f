"""The model calls of a run as MLflow shall show them: metrics by generation, a trace by scope.

A scope is one session of an agent or one attempt of a target: `g003-c0/meta`, `g003-c0/target`,
`g003/decision`. Its trace holds the first calls as spans, and totals over all of them.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sia.gateway.protocol import Role, Spend
from sia.gateway.store import STORE_FILE, Exchange, read_exchanges
from sia.tracking.messages import Conversation, conversation

MAX_SPANS = 100  # calls of one scope that are shown; a target may make one for each item
MAX_PREVIEW = 1_000  # characters; MLflow refuses more
_SCOPE = re.compile(r"g(\d+)(?:-c\d+)?/([a-z]+)(?:-\d+)?")  # -2: a second session


@dataclass(frozen=True, kw_only=True)
class ScopeCalls:
    """What the calls of one scope add up to.

    Attributes:
        generation: The one they count for: a decision counts for the generation that it leads to.
            None for calls outside the loop.
        first: Id of the first exchange.
        last: Id of the last one.
        spans: Calls that differ: without those that a resumed run got from its own recording.
        problem: How the last call failed; empty if it did not.
    """

    scope: str
    role: Role
    generation: int | None
    first: int
    last: int
    spans: int
    spend: Spend
    problem: str
    started: float
    ended: float

    @property
    def calls(self) -> int:
        """All of them, failed and replayed ones included."""
        return self.spend.calls + self.spend.failed + self.spend.replayed


@dataclass(frozen=True, kw_only=True)
class TraceView:
    """One trace: spans in the shape of `mlflow.entities.Span.to_dict`, the root first.

    Attributes:
        metadata: Facts about the whole, in MLflow's names.
        failed: No call succeeded, or the last one of a session did not.
    """

    trace_id: str
    prompt: str
    reply: str
    tags: dict[str, str]
    metadata: dict[str, str]
    spans: list[dict[str, Any]]
    failed: bool
    started_ms: int
    duration_ms: int


class CallsView:
    """Reads the recording of a run piece by piece, each exchange once for the totals."""

    def __init__(self, run: Path, run_id: str) -> None:
        self._path = run / STORE_FILE
        self._run_id = run_id
        self._after = 0
        self._scopes: dict[str, ScopeCalls] = {}

    def read(self) -> None:
        """Takes in what was recorded since the last call; nothing where there is no gateway."""
        for exchange in read_exchanges(self._path, self._after):
            self._after = exchange.id
            if exchange.counted:
                known = self._scopes.get(exchange.scope)
                self._scopes[exchange.scope] = _added(known, exchange)

    def scopes(self) -> list[ScopeCalls]:
        """All scopes, in the order of their first calls."""
        return list(self._scopes.values())

    def metrics(self, generation: int) -> dict[str, float]:
        """Of the calls that count for one generation."""
        return _metrics(one for one in self.scopes() if one.generation == generation)

    def totals(self, generation: int | None = None) -> dict[str, float]:
        """Of all calls that count for the generations up to this one; None means of all calls."""
        return _metrics(
            one
            for one in self.scopes()
            if generation is None or (one.generation is not None and one.generation <= generation)
        )

    def trace(self, one: ScopeCalls) -> TraceView:
        """The trace of a scope; a function of what is recorded, ids included."""
        shown = list(islice(self._of(one, one.first), MAX_SPANS))
        told = [_told(each) for each in shown]
        last = told[-1]
        if one.last != shown[-1].id:
            (end,) = islice(self._of(one, one.last), 1)
            last = _told(end)
        trace_id = _digest(self._run_id, one.scope)[:32]
        root = trace_id[:16]
        tags = {
            "sia.run_id": self._run_id,
            "sia.scope": one.scope,
            "sia.role": one.role.value,
            "sia.calls": str(one.calls),
        }
        if one.generation is not None:
            tags["sia.generation"] = str(one.generation)
        place = one.scope.partition("/")[0]
        if "-c" in place:
            tags["sia.candidate"] = place
        if one.spend.failed:
            tags["sia.failed_calls"] = str(one.spend.failed)
        about: dict[str, Any] = {"sia.calls": one.calls, **_spend_attributes(one.spend)}
        if one.spans > len(shown):
            note = (
                f"The first {len(shown)} of {one.spans} calls; totals are over all of them. "
                f"All are in {self._path.name} of the run directory."
            )
            about["mlflow.spanDescription"] = tags["sia.note"] = note
        session = one.role is not Role.TARGET
        failed = one.calls == one.spend.failed or (session and one.problem != "")
        problem = one.problem if failed else ""
        replies = [{"message": {"role": "assistant", "content": last.reply}}] if last.reply else []
        about |= {
            "mlflow.spanType": "AGENT" if session else "TASK",
            "mlflow.spanInputs": {"messages": [{"role": "user", "content": told[0].prompt}]},
            "mlflow.spanOutputs": {"choices": replies},
        }
        spans = [_span(trace_id, root, None, one.scope, one.started, one.ended, problem, about)]
        for number, (exchange, talk) in enumerate(zip(shown, told, strict=True)):
            spans.append(_call_span(trace_id, root, number, exchange, talk))
        usage = {
            "input_tokens": one.spend.input_tokens,
            "output_tokens": one.spend.output_tokens,
            "total_tokens": one.spend.input_tokens + one.spend.output_tokens,
        }
        return TraceView(
            trace_id=f"tr-{trace_id}",
            prompt=told[0].prompt[:MAX_PREVIEW],
            reply=(problem or last.reply)[:MAX_PREVIEW],
            tags=tags,
            metadata={
                "mlflow.trace.session": self._run_id,
                "mlflow.trace.tokenUsage": json.dumps(usage),
                "mlflow.trace.cost": json.dumps({"total_cost": one.spend.cost_usd}),
            },
            spans=spans,
            failed=failed,
            started_ms=round(1000 * one.started),
            duration_ms=round(1000 * (one.ended - one.started)),
        )

    def _of(self, one: ScopeCalls, first: int) -> Iterator[Exchange]:
        """The exchanges of a scope from the id `first` on; repeats are left out."""
        for exchange in read_exchanges(self._path, first - 1):
            if exchange.id > one.last:
                return
            if exchange.scope == one.scope and exchange.counted and not _is_repeat(exchange):
                yield exchange


def generation_of(scope: str) -> int | None:
    """The generation that the calls of a scope count for, as in `ScopeCalls`."""
    found = _SCOPE.fullmatch(scope)
    return None if found is None else int(found[1]) + (found[2] == "decision")


def _told(exchange: Exchange) -> Conversation:
    return conversation(exchange.format, exchange.request(), exchange.body())


def _is_repeat(exchange: Exchange) -> bool:
    """Whether a resumed run got it from its own recording, which holds the original, too."""
    return exchange.source == "store"


def _added(known: ScopeCalls | None, exchange: Exchange) -> ScopeCalls:
    ended = exchange.started_at + exchange.wall_s
    spend = exchange.spend()
    if known and _is_repeat(exchange):
        return replace(known, spend=known.spend + spend)
    return ScopeCalls(
        scope=exchange.scope,
        role=exchange.role,
        generation=generation_of(exchange.scope),
        first=known.first if known else exchange.id,
        last=exchange.id,
        spans=known.spans + 1 if known else 1,
        spend=known.spend + spend if known else spend,
        problem=exchange.failure,
        started=min(known.started, exchange.started_at) if known else exchange.started_at,
        ended=max(known.ended, ended) if known else ended,
    )


def _metrics(scopes: Iterable[ScopeCalls]) -> dict[str, float]:
    """Totals in MLflow's names; empty where nothing was called."""
    roles: dict[Role, Spend] = {}
    for one in scopes:
        roles[one.role] = roles.get(one.role, Spend()) + one.spend
    if not roles:
        return {}
    total = sum(roles.values(), Spend())
    metrics: dict[str, float] = {
        "calls": total.calls,
        "tokens/input": total.input_tokens,
        "tokens/cached": total.cached_tokens,
        "tokens/output": total.output_tokens,
        "cost_usd": total.cost_usd,
    }
    for name in ("failed", "replayed", "unpriced"):
        if count := getattr(total, name):
            metrics[f"calls/{name}"] = count
    for role in sorted(roles):
        metrics[f"cost_usd/{role}"] = roles[role].cost_usd
    return metrics


def _call_span(
    trace_id: str, root: str, number: int, exchange: Exchange, talk: Conversation
) -> dict[str, Any]:
    spend = exchange.spend()
    model = exchange.served_model or exchange.model
    attributes: dict[str, Any] = {
        "mlflow.spanType": "EMBEDDING" if exchange.format == "embeddings" else "CHAT_MODEL",
        "mlflow.spanInputs": talk.inputs,
        "mlflow.spanOutputs": talk.outputs,
        "mlflow.message.format": "openai",
        "mlflow.llm.model": model,
        "mlflow.llm.provider": exchange.provider,
        "sia.exchange": exchange.id,
        "sia.format": exchange.format,
        "sia.requested_model": exchange.requested_model,
        "sia.stream": exchange.stream,
        "sia.status": exchange.status,
        "sia.attempts": exchange.attempts,
        **_spend_attributes(spend),
    }
    if exchange.source:
        attributes["sia.answered_by"] = exchange.source
    if exchange.estimated:
        attributes["sia.estimated_tokens"] = True
    if talk.tools:
        attributes["sia.tools"] = list(talk.tools)
    started = exchange.started_at
    return _span(
        trace_id,
        _digest(trace_id, str(exchange.id))[:16],
        root,
        f"{number + 1:03} {model}",
        started,
        started + exchange.wall_s,
        exchange.failure,
        attributes,
    )


def _spend_attributes(spend: Spend) -> dict[str, Any]:
    if not spend.input_tokens and not spend.output_tokens:
        return {}
    usage = {
        "input_tokens": spend.input_tokens,
        "output_tokens": spend.output_tokens,
        "total_tokens": spend.input_tokens + spend.output_tokens,
        "cache_read_input_tokens": spend.cached_tokens,
    }
    known = {} if spend.unpriced else {"mlflow.llm.cost": {"total_cost": spend.cost_usd}}
    return {"mlflow.chat.tokenUsage": usage, **known}


def _span(
    trace_id: str,
    span_id: str,
    parent: str | None,
    name: str,
    started: float,
    ended: float,
    problem: str,
    attributes: dict[str, Any],
) -> dict[str, Any]:
    values = {"mlflow.traceRequestId": f"tr-{trace_id}", **attributes}
    return {
        "trace_id": _base64(trace_id),
        "span_id": _base64(span_id),
        "parent_span_id": None if parent is None else _base64(parent),
        "name": name,
        "start_time_unix_nano": round(1e9 * started),
        "end_time_unix_nano": round(1e9 * ended),
        "events": [],
        "links": [],
        "status": {
            "code": "STATUS_CODE_ERROR" if problem else "STATUS_CODE_OK",
            "message": problem,
        },
        "attributes": {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()},
    }


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()
