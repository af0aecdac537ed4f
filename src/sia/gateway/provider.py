"""Who answers a model call, what the model is called there, and what a token costs."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sia.errors import ProviderError

FORMATS = ("chat", "responses", "messages", "embeddings")
"""OpenAI chat completions and responses, Anthropic messages, OpenAI embeddings."""

DATED = re.compile(r"[-@](\d{8}|\d{4}-\d{2}-\d{2})")
MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The tokens of one call.

    Attributes:
        input_tokens: The whole prompt; what was read from the vendor's cache or written to it
            is a part of it.
        cached_tokens: Read from the cache.
        cache_write_tokens: Written to the cache.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Price:
    """USD per million tokens; a cache without a price of its own costs what input costs."""

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None

    def of(self, usage: Usage) -> float:
        """What `usage` costs, in USD."""
        plain = usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens
        cached = self.input if self.cached is None else self.cached
        cache_write = self.input if self.cache_write is None else self.cache_write
        return (
            plain * self.input
            + usage.cached_tokens * cached
            + usage.cache_write_tokens * cache_write
            + usage.output_tokens * self.output
        ) / MILLION


@dataclass(frozen=True, kw_only=True)
class Provider:
    """A model provider; one option of `conf/provider/`.

    Attributes:
        base_url: Where the OpenAI formats are, `/v1` included: what an SDK calls OPENAI_BASE_URL.
            `unix:///path/policy.sock` is a server on a Unix socket: the path up to the first name
            that ends in `.sock` is the socket, the rest of it (or `/v1`) the path there.
        anthropic_url: Where the Anthropic format is, without `/v1`: ANTHROPIC_BASE_URL.
        formats: Which of `FORMATS` it speaks.
        api_key_env: The variable that holds the key; empty for a server that needs none.
        models: Alias -> exact id.
        prices: Exact id, or the id without its date, -> price.
        prices_as_of: ISO date on which the prices were read.
    """

    name: str
    base_url: str = ""
    anthropic_url: str = ""
    formats: tuple[str, ...] = ("chat",)
    api_key_env: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    prices: Mapping[str, Price] = field(default_factory=dict)
    prices_as_of: str = ""

    def __post_init__(self) -> None:
        for spoken in self.formats:
            if spoken not in FORMATS:
                raise ProviderError(
                    f"provider.formats has {spoken!r}; known are {', '.join(FORMATS)}."
                )
            if not self.url_of(spoken):
                name = "anthropic_url" if spoken == "messages" else "base_url"
                raise ProviderError(
                    f"provider {self.name!r} speaks {spoken!r} but has no address for it: "
                    f"provider.{name}=https://..."
                )

    def key(self) -> str:
        """The key from the environment; empty where none is needed.

        Raises:
            ProviderError: The variable is not set, or cannot be a key.
        """
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ProviderError(
                f"provider {self.name!r} needs its key in ${self.api_key_env}, which is not set: "
                f"export {self.api_key_env}=..."
            )
        if not key.isascii() or not key.isprintable():
            raise ProviderError(
                f"${self.api_key_env} holds characters that no key has. Set it again: "
                f"export {self.api_key_env}=..."
            )
        return key

    def resolve(self, model: str) -> str:
        """The exact id of a model; an unknown name is taken for one."""
        return self.models.get(model, model)

    def price(self, model: str) -> Price | None:
        """The price of an exact id.

        That of the id itself, else that of the longest id of which it is a dated version
        (`claude-sonnet-4-5` prices `claude-sonnet-4-5-20250929`).
        """
        if (price := self.prices.get(model)) is not None:
            return price
        dated = [
            name
            for name in self.prices
            if model.startswith(name) and DATED.fullmatch(model[len(name) :])
        ]
        return self.prices[max(dated, key=len)] if dated else None

    def cost(self, model: str, usage: Usage) -> float | None:
        """What a call cost, in USD; None where the model has no price."""
        price = self.price(model)
        return None if price is None else price.of(usage)

    def url_of(self, spoken: str) -> str:
        """The address that a format is spoken at; empty if there is none."""
        return self.anthropic_url if spoken == "messages" else self.base_url
