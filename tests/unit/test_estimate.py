"""What a dry run says: sums that can be checked by hand, and a report that costs nothing."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sia import spend
from sia.config import BudgetConfig
from sia.errors import ConfigError
from sia.estimate import HIGH, LOW, TYPICAL, Assumed, Plan, caps, dry_run, estimate, tokens
from sia.gateway.protocol import Role, Spend
from sia.gateway.provider import Price
from sia.records import RunResult
from sia.rundir import RunDir, RunInfo

PLAN = Plan(
    generations=3, candidates=2, max_turns=2, given=100, items=None, item=50,
    prices={"meta": Price(input=1.0, output=10.0, cached=0.1)},
)  # fmt: skip
ASSUMED = Assumed(
    turns=2, decision_turns=1, frame=900, growth=200, reply=10, cache=0.5,
    item_calls=2, shown=3, answer=7,
)  # fmt: skip


def test_every_turn_of_a_session_sends_the_conversation_so_far() -> None:
    (meta,) = estimate(PLAN, ASSUMED).values()
    # Five sessions that write (1 + 2 x 2), two that decide.
    assert meta.calls == 5 * 2 + 2 * 1
    assert meta.input_tokens == 5 * (1_000 + 1_200) + 2 * 1_000
    assert meta.cached_tokens == 5 * 500
    assert meta.output_tokens == 12 * 10
    paid = (meta.input_tokens - meta.cached_tokens) * 1.0 + meta.cached_tokens * 0.1 + 120 * 10.0
    assert meta.cost_usd == pytest.approx(paid / 1e6)


def test_a_target_asks_about_every_item_of_every_attempt() -> None:
    target = estimate(replace(PLAN, max_turns=None, items=1713), ASSUMED)["target"]
    assert target.calls == 5 * 1713 * 2
    assert target.input_tokens == target.calls * (300 + 3 * 50)
    assert target.unpriced == target.calls
    assert target.cost_usd == 0


def test_max_turns_bounds_every_guess() -> None:
    for assumed in (LOW, TYPICAL, HIGH):
        assert estimate(replace(PLAN, max_turns=1), assumed)["meta"].calls == 7
    ends = [estimate(replace(PLAN, max_turns=40), one)["meta"] for one in (LOW, TYPICAL, HIGH)]
    assert ends[2].calls == 5 * 40 + 2 * 15
    for name in ("calls", "input_tokens", "output_tokens", "cost_usd"):
        low, typical, high = (getattr(one, name) for one in ends)
        assert low < typical < high


def test_a_run_that_asks_no_model_costs_nothing() -> None:
    assert estimate(replace(PLAN, max_turns=None), HIGH) == {}


def test_limits_say_where_they_end_a_run() -> None:
    low = Spend(calls=100, input_tokens=1_000, cost_usd=2.0)
    high = Spend(calls=900, input_tokens=9_000, cost_usd=20.0)
    budget = BudgetConfig(wall_s=None, usd=1.0, tokens=5_000, requests=900)
    assert dict(caps(budget, low, high, 10)) == {
        "budget.usd=1": "ends the run after about 5 of 10 generations, or earlier",
        "budget.tokens=5000": "may end the run early",
        "budget.requests=900": "not reached",
    }
    none = BudgetConfig(wall_s=None, usd=None, tokens=None, requests=None)
    assert list(caps(none, low, high, 10)) == []


def test_signs_beyond_ascii_are_tokens_of_their_own() -> None:
    assert tokens("") == 0
    assert tokens("four" * 10) == 10
    assert tokens("盗窃罪") == 3


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a provider, an agent and a target; the working directory is empty."""
    folder = tmp_path / "conf"
    for name, text in {
        "meta/agent": "defaults:\n  - /schema/meta/pydantic_ai@_here_\nmodel: big\n",
        "target/asking": "harness: reference\nmodel: small\n",
        "provider/acme": "name: acme\nbase_url: http://127.0.0.1:9/v1\nformats: [chat]\n"
        "api_key_env: ACME_API_KEY\nmodels: {big: acme-big-1}\nprices_as_of: 2026-01-01\n"
        "prices: {acme-big-1: {input: 3, output: 15, cached: 0.3}}\n",
    }.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("ACME_API_KEY", raising=False)
    return folder


def shown(*argv: str) -> str:
    file = io.StringIO()
    dry_run([*argv, "--dry-run"], Console(file=file, width=80))
    return file.getvalue()


def test_the_plan_is_shown_without_a_key_and_leaves_nothing(conf: Path) -> None:
    text = shown("-cd", str(conf), "task=toy", "provider=acme", "meta=agent", "target=asking",
                 "generations=5", "budget.usd=50", "sandbox=process")  # fmt: skip
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "meta agent, model acme-big-1 of acme" in lines
    assert "target asking, model small of acme" in lines
    assert "loop 5 generations at most, 5 attempts" in lines
    assert "budget usd=50" in lines
    (meta,) = [line for line in lines if line.startswith("meta ") and "$" in line]
    assert meta.startswith("meta 52 · 124 · 260 ")  # 5 x (8, 20, 40) + 4 x (3, 6, 15) calls
    (target,) = [line for line in lines if line.startswith("target ") and "price" in line]
    assert target.endswith("no price")
    assert any("small has none in provider acme" in line for line in lines)
    assert any(line.startswith("limit budget.usd=50: ") for line in lines)
    assert not list(Path().iterdir())


def test_the_embedded_default_costs_nothing(conf: Path) -> None:
    assert "nothing: no model is called" in shown("task=toy", "sandbox=process")


def test_a_model_without_a_provider_is_a_mistake(conf: Path) -> None:
    with pytest.raises(ConfigError, match=r"meta\.model='big' needs a provider"):
        shown("-cd", str(conf), "task=toy", "meta=agent", "sandbox=process")


def test_what_an_earlier_run_has_spent_is_the_better_guess(conf: Path) -> None:
    argv = ["-cd", str(conf), "task=toy", "provider=acme", "meta=agent", "sandbox=process",
            "generations=10"]  # fmt: skip
    paid = spend.as_record({Role.META: Spend(calls=9, input_tokens=10_000, cost_usd=2.0)})
    for number, (meta, model) in enumerate([("agent", "big"), ("agent", "other"), ("x", "big")]):
        info = RunInfo(
            run_id=str(number), task="toy", task_version=1, meta=meta, target="embedded", seed=0,
            config_sha256="", created_at=f"2026-01-0{number + 1}T00:00:00+00:00", protocol=1,
        )  # fmt: skip
        config = f"meta: {{model: {model}}}\ntarget: {{model: null}}\nprovider: {{name: acme}}\n"
        run = RunDir.create(Path(f"runs/r{number}"), info, config)
        run.finish(RunResult(status="finished", reason="", generations=4, spend=paid))
        run.close()
    (line,) = [line for line in shown(*argv).splitlines() if line.startswith("recorded")]
    assert "runs/r0 spent $2.0000, 10k tokens in 4 generations" in line
    assert "this run costs $5.0000" in line
