"""Providers and target profiles: they fit the gateway, and their prices are those of the data."""

import re
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from sia import build
from sia.gateway.provider import Price, Provider
from sia.gateway.provider import Usage as Tokens

ROOT = Path(__file__).resolve().parents[2]
PROVIDERS = sorted(
    path.stem
    for path in (ROOT / "conf" / "provider").glob("*.yaml")
    if path.stem not in ("none", "local")  # nobody's, and the run's own
)
PROFILES = {
    "haiku": ("anthropic", "claude-haiku-4-5-20251001"),
    "gptoss_nebius": ("nebius", "openai/gpt-oss-120b-fast"),
    "gptoss_tinker": ("tinker", "openai/gpt-oss-120b"),
    "kimi_nebius": ("nebius", "moonshotai/Kimi-K2.6"),
    "openrouter": ("openrouter", "anthropic/claude-haiku-4.5"),
    "qwen3_tinker": ("tinker", "Qwen/Qwen3-4B-Instruct-2507"),
    "qwen_nebius": ("nebius", "Qwen/Qwen3-Next-80B-A3B-Thinking-fast"),
}


def made(node: Any) -> Provider:
    """The gateway's provider of a node of the configuration."""
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)
    prices = {name: Price(**price) for name, price in plain.pop("prices").items()}
    given = {name: value for name, value in plain.items() if value is not None}
    return Provider(**{**given, "formats": tuple(given["formats"]), "prices": prices})


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("sia_prices", str(ROOT / "scripts" / "prices"))
    spec = spec_from_loader("sia_prices", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_is_one_of_the_gateways(composed: Callable, name: str) -> None:
    cfg = composed([f"provider={name}"])
    provider = made(cfg.provider)
    assert provider.name == name
    assert provider.url_of("chat")
    # Without a key of its own it is a server of yours; elsewhere a key must not travel in clear.
    assert (provider.api_key_env == "") == provider.base_url.startswith("http://")
    assert bool(provider.prices) == bool(provider.prices_as_of)
    for model in provider.models.values():
        assert provider.price(model)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_a_provider_and_a_model(composed: Callable, name: str) -> None:
    cfg = composed([f"target={name}"])
    provider = made(cfg.target.provider)
    assert (provider.name, cfg.target.model) == PROFILES[name]
    assert (cfg.target.harness, cfg.provider.name) == ("llm", "none")
    assert not provider.prices or provider.price(cfg.target.model)
    checked = build.check(cfg)
    assert checked.first_harness == ROOT / "tasks" / "lawbench" / "harness_llm"
    assert build.limits(cfg, checked.task).attempt_s == 3600


def test_every_profile_is_listed_here() -> None:
    options = {path.stem for path in (ROOT / "conf" / "target").glob("*.yaml")}
    assert options - {"embedded", "llm", "hf", "smollm2"} == PROFILES.keys()


def test_a_task_without_a_language_model_harness_says_so(composed: Callable) -> None:
    cfg = composed(["task=toy", "target=llm", "target.model=x", "provider=ollama"])
    with pytest.raises(Exception, match=r"harness of task 'toy' \(reference\)"):
        build.check(cfg)


def test_the_scripted_endpoint_may_be_elsewhere(
    composed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIA_SCRIPTED_URL", raising=False)
    assert made(composed(["provider=scripted"]).provider).base_url == "http://127.0.0.1:8399/v1"
    monkeypatch.setenv("SIA_SCRIPTED_URL", "http://127.0.0.1:1234")
    provider = made(composed(["provider=scripted"]).provider)
    assert provider.base_url == "http://127.0.0.1:1234/v1"
    assert provider.anthropic_url == "http://127.0.0.1:1234"
    tokens = Tokens(input_tokens=1_000_000, cached_tokens=500_000, output_tokens=500_000)
    assert provider.cost(provider.resolve("scripted"), tokens) == pytest.approx(0.5 + 0.05 + 1.0)


@pytest.mark.parametrize("name", ["anthropic", "gemini", "openai", "openrouter", "together"])
def test_prices_are_those_of_the_pinned_data(script: ModuleType, name: str) -> None:
    try:
        found = version("genai-prices")
    except PackageNotFoundError:
        pytest.skip("no genai-prices")
    if found != script.VERSION:
        pytest.skip(f"genai-prices is {found}, the table is from {script.VERSION}")
    text = (ROOT / "conf" / "provider" / f"{name}.yaml").read_text()
    models = script.named(text)
    assert models
    assert text == script.rewritten(text, script.prices(script.PROVIDERS[name], models))


def test_the_script_writes_what_it_says(script: ModuleType) -> None:
    text = '# A\nname: a\nprices_as_of: "x"\nprices:\n  m: {}\n  n/1: {}\n'
    table = {"m": ({"input": 1.0, "output": 2.5}, ""), "n/1": ({"input": 0.1}, "more above 9")}
    written = script.rewritten(text, table)
    assert yaml.safe_load(written) == {
        "name": "a", "prices_as_of": script.AS_OF,
        "prices": {"m": {"input": 1.0, "output": 2.5}, "n/1": {"input": 0.1}},
    }  # fmt: skip
    assert "# more above 9\n" in written
    assert script.rewritten(written, table) == written


def test_a_model_that_the_data_do_not_know_is_named(script: ModuleType) -> None:
    pytest.importorskip("genai_prices")
    with pytest.raises(SystemExit, match=re.escape("has no 'claude-x' of anthropic")):
        script.prices("anthropic", ["claude-x"])
