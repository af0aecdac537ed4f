"""A causal language model of transformers behind the OpenAI wire format.

One request at a time, in the order in which they come; greedy, or sampled with the request's seed.
Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jinja2
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sia.errors import ProviderError, WeightsError

MAX_TOKENS = 1024  # of an answer whose request sets no limit
MAX_TOP = 20
# Accepted where it changes nothing.
UNKNOWN = {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0}


class BadRequest(Exception):
    """A request that this server cannot fulfil."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token and how likely it was: in nats, under the model as it is (temperature 1)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one answer is generated."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    top: int
    stop: tuple[str, ...]


@dataclass(kw_only=True)
class Answer:
    """An answer as it grows; `finish` is set when it is whole."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""


class TorchModel:
    """A base, and an adapter merged into it where there is one."""

    def __init__(self, base: str, *, adapter: Path | None, threads: int) -> None:
        """Loads both, onto a GPU where there is one.

        Raises:
            ProviderError: The base cannot be loaded.
            WeightsError: The adapter cannot be loaded, or was made for another base.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        cast(Any, transformers_logging).disable_progress_bar()
        torch.set_num_threads(threads)
        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ProviderError(
                f"transformers cannot load {base!r}: {str(error).splitlines()[0]}"
            ) from error
        if adapter is not None:
            model = _with_adapter(model, adapter)
        self._model = model.to("cuda" if gpu else "cpu").eval()
        ends = model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        self.context: int = model.config.get_text_config().max_position_embeddings

    def prompt_of(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the answer begins."""
        plain = [
            {**message, "content": _text(message.get("content"))}
            for message in messages
            if isinstance(message, Mapping)
        ]
        if not plain:
            raise BadRequest("the request has no messages")
        if not self.tokenizer.chat_template:
            return self.tokens("\n\n".join(str(message["content"]) for message in plain))
        try:
            text = self.tokenizer.apply_chat_template(
                plain, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRequest(f"the chat template refuses the messages: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokens(self, text: str) -> list[int]:
        """Tokens of a plain text."""
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def spelled(self, id: int) -> str:
        """One token, special or not."""
        return str(self.tokenizer.decode([id]))

    def score(self, ids: Sequence[int], top: int) -> list[Token | None]:
        """How likely each token of a text was, given those before it; None for the first one."""
        logits_TV = self._logits(ids, keep=len(ids))
        scored = [_token(row_V, id, top) for row_V, id in zip(logits_TV[:-1], ids[1:], strict=True)]
        return [None, *scored]

    def generate(self, prompt: Sequence[int], settings: Settings) -> Iterator[Answer]:
        """The same answer again and again, a token longer each time."""
        from transformers.cache_utils import DynamicCache

        if len(prompt) + 1 > self.context:
            raise BadRequest(f"the prompt has {len(prompt)} tokens, the model takes {self.context}")
        random = torch.Generator()
        if settings.seed is None:
            random.seed()
        else:
            random.manual_seed(settings.seed)
        answer, made, cache = Answer(), list[int](), DynamicCache(config=self._model.config)
        fresh = list(prompt)
        while not answer.finish:
            logits_V = self._logits(fresh, keep=1, cache=cache)[-1]
            chosen = _choose(logits_V, settings, random)
            if chosen in self._ends:
                answer.finish = "stop"
            else:
                made.append(chosen)
                answer.text = self.decode(made)
                room = self.context - len(prompt)
                if len(made) >= min(settings.max_tokens, room):
                    answer.finish = "length"
                if found := [at for s in settings.stop if (at := answer.text.find(s)) >= 0]:
                    answer.text, answer.finish = answer.text[: min(found)], "stop"
                answer.tokens.append(_token(logits_V, chosen, settings.top))
                fresh = [chosen]
            yield answer

    def _logits(self, ids: Sequence[int], *, keep: int, cache: Any = None) -> torch.Tensor:
        """Of the last `keep` tokens, on the CPU; `cache` holds those before and takes these."""
        ids_1T = torch.tensor([list(ids)], device=self._model.device)
        with torch.inference_mode():
            out = self._model(ids_1T, cache=cache, use_cache=cache is not None, logits_to_keep=keep)
            return cast(torch.Tensor, out.logits[0].float().cpu())


def serve_torch(
    base: str, *, name: str, adapter: Path | None, uds: Path | None, port: int, threads: int
) -> None:
    """Serves until a signal comes; see `sia.weights.serve`."""
    model = TorchModel(base, adapter=adapter, threads=threads)
    config = uvicorn.Config(
        app(model, name),
        uds=str(uds) if uds else None,
        host="127.0.0.1",
        port=port,
        log_level="warning",
        lifespan="off",
        ws="none",
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            where = server.servers[0].sockets[0].getsockname()
            where = f"unix://{uds}" if uds else f"http://{where[0]}:{where[1]}"
            print(f"listening on {where}", flush=True)
        await serving

    asyncio.run(run())


def app(model: TorchModel, name: str) -> Starlette:
    """The endpoint, which calls the model `name`."""
    busy = asyncio.Lock()

    def handler(answer: Callable[[dict[str, Any]], Iterator[dict[str, Any]]]) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                data = _request(await request.body())
                parts = answer(data)
                if data.get("stream"):
                    async with busy:
                        first = await run_in_threadpool(next, parts)
                    return StreamingResponse(
                        _events(first, parts, busy), media_type="text/event-stream"
                    )
                async with busy:
                    return JSONResponse(await run_in_threadpool(_only, parts))
            except BadRequest as error:
                body = {"message": str(error), "type": "invalid_request_error"}
                return JSONResponse({"error": body}, status_code=400)

        return endpoint

    async def models(request: Request) -> Response:
        item = {"id": name, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [item]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route(
                "/v1/chat/completions",
                handler(lambda data: _chat(model, name, data)),
                methods=["POST"],
            ),
            Route(
                "/v1/completions",
                handler(lambda data: _complete(model, name, data)),
                methods=["POST"],
            ),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )


def _chat(model: TorchModel, name: str, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One chat completion, or its chunks."""
    for unknown in ("tools", "functions", "response_format"):
        if data.get(unknown) and data[unknown] != {"type": "text"}:
            raise BadRequest(f"this server does not know {unknown!r}")
    settings = _settings(data, top=_number(data, "top_logprobs", 0) if data.get("logprobs") else 0)
    if settings.max_tokens < 1:
        raise BadRequest("max_tokens has to be at least 1")
    prompt = model.prompt_of(data.get("messages") or ())
    stream = bool(data.get("stream"))
    head = _head("chat.completion.chunk" if stream else "chat.completion", "chatcmpl", name)
    answer, sent, counted = Answer(), 0, 0
    for answer in model.generate(prompt, settings):
        # A character may take several tokens; until it is whole it reads as a replacement.
        if not stream or (answer.text.endswith("\ufffd") and not answer.finish):
            continue
        if _may_stop(answer, settings):
            continue
        delta: dict[str, Any] = {"content": answer.text[sent:]}
        if not counted and not sent:
            delta["role"] = "assistant"
        choice = {"index": 0, "delta": delta, "finish_reason": answer.finish or None}
        if data.get("logprobs"):
            fresh = answer.tokens[counted:]
            choice["logprobs"] = {"content": [_chat_logprob(model, token) for token in fresh]}
        sent, counted = len(answer.text), len(answer.tokens)
        yield {**head, "choices": [choice]}
    usage = _usage(len(prompt), answer)
    if stream:
        if (data.get("stream_options") or {}).get("include_usage"):
            yield {**head, "choices": [], "usage": usage}
        return
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
    if data.get("logprobs"):
        choice["logprobs"] = {"content": [_chat_logprob(model, token) for token in answer.tokens]}
    yield {**head, "choices": [choice], "usage": usage}


def _complete(model: TorchModel, name: str, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One completion; with `echo` the prompt is scored, too, which is what likelihoods need."""
    prompt = data.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadRequest("prompt has to be one text")
    if data.get("stream"):
        raise BadRequest("completions are not streamed; chat completions are")
    settings = _settings(data, top=_number(data, "logprobs", 0))
    ids = model.tokens(prompt)
    scored: list[Token | None] = []
    if data.get("echo") and data.get("logprobs") is not None:
        scored = model.score(ids, settings.top)
    answer = Answer(finish="length")
    if settings.max_tokens > 0:
        *_, answer = model.generate(ids, settings)
    shown = [*zip(ids, scored, strict=False), *((token.id, token) for token in answer.tokens)]
    choice: dict[str, Any] = {
        "index": 0,
        "text": (prompt if data.get("echo") else "") + answer.text,
        "finish_reason": answer.finish,
        "logprobs": None,
    }
    if data.get("logprobs") is not None:
        texts = [model.spelled(id) for id, _ in shown]
        choice["logprobs"] = {
            "tokens": texts,
            "token_logprobs": [token and token.logprob for _, token in shown],
            "top_logprobs": [
                token and {model.spelled(id): logprob for id, logprob in token.top}
                for _, token in shown
            ],
            "text_offset": [sum(map(len, texts[:k])) for k in range(len(texts))],
        }
    head = _head("text_completion", "cmpl", name)
    yield {**head, "choices": [choice], "usage": _usage(len(ids), answer)}


def _settings(data: Mapping[str, Any], *, top: int) -> Settings:
    for unknown, harmless in UNKNOWN.items():
        if data.get(unknown) not in (None, harmless):
            raise BadRequest(f"this server does not know {unknown}={data[unknown]!r}")
    stop = data.get("stop") or ()
    limit = _number(data, "max_tokens", _number(data, "max_completion_tokens", MAX_TOKENS))
    temperature = _number(data, "temperature", 1.0)
    if temperature < 0 or limit < 0 or not 0 <= top <= MAX_TOP:
        raise BadRequest(
            f"temperature, max_tokens or the log-probabilities are out of 0 to {MAX_TOP}"
        )
    seed = data.get("seed")
    return Settings(
        max_tokens=int(limit),
        temperature=float(temperature),
        top_p=float(_number(data, "top_p", 1.0)),
        seed=None if seed is None else int(_number(data, "seed", 0)) % 2**63,
        top=int(top),
        stop=(stop,) if isinstance(stop, str) else tuple(map(str, stop)),
    )


def _number(data: Mapping[str, Any], name: str, default: float) -> Any:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequest(f"{name}={value!r} is no number")
    return value


def _choose(logits_V: torch.Tensor, settings: Settings, random: torch.Generator) -> int:
    if settings.temperature == 0:
        return int(logits_V.argmax())
    probs_V = (logits_V / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True)
        before_V = sorted_V.cumsum(0) - sorted_V
        probs_V = torch.zeros_like(probs_V)
        kept = before_V < max(settings.top_p, 1e-9)
        probs_V[order_V[kept]] = sorted_V[kept]
    return int(torch.multinomial(probs_V, 1, generator=random))


def _token(logits_V: torch.Tensor, id: int, top: int) -> Token:
    logprobs_V = logits_V.float().log_softmax(-1)
    values, ids = logprobs_V.topk(top) if top else ((), ())
    best = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))
    return Token(id=id, logprob=float(logprobs_V[id]), top=best)


def _may_stop(answer: Answer, settings: Settings) -> bool:
    """Whether the end of the text may be the beginning of a stop text."""
    return not answer.finish and any(
        answer.text.endswith(stop[:k]) for stop in settings.stop for k in range(1, len(stop))
    )


def _chat_logprob(model: TorchModel, token: Token) -> dict[str, Any]:
    def entry(id: int, logprob: float) -> dict[str, Any]:
        text = model.spelled(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        **entry(token.id, token.logprob),
        "top_logprobs": [entry(id, logprob) for id, logprob in token.top],
    }


def _usage(prompt: int, answer: Answer) -> dict[str, int]:
    made = len(answer.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _head(kind: str, prefix: str, name: str) -> dict[str, Any]:
    now = time.time()
    return {
        "id": f"{prefix}-{int(now * 1e6):x}", "object": kind, "created": int(now), "model": name
    }  # fmt: skip


def _request(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except ValueError as error:
        raise BadRequest(f"the request is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadRequest("the request is not a JSON object")
    return data


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _only(parts: Iterator[dict[str, Any]]) -> dict[str, Any]:
    (whole,) = parts
    return whole


async def _events(
    first: dict[str, Any], rest: Iterator[dict[str, Any]], busy: asyncio.Lock
) -> AsyncIterator[bytes]:
    async with busy:
        yield _event(first)
        async for part in iterate_in_threadpool(rest):
            yield _event(part)
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        return adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WeightsError(
            f"The adapter in {adapter} cannot be put on the base: {str(error).splitlines()[0]}"
        ) from error
