"""What a run would call and cost: a low, a typical and a high guess from what is known before it.

`python -m sia ... --dry-run` prints it. Nothing here asks a model, and no key is needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from sia import build, rundir, spend
from sia.compose import composed, providers
from sia.config import BudgetConfig, Config
from sia.errors import RunDirectoryError
from sia.gateway.protocol import Spend
from sia.gateway.provider import Price, Provider, Usage
from sia.tasks import Task

CONTEXT = 200_000  # tokens that a call can hold; agents shorten what is longer
PROMPT = 300  # tokens around one item in a target's call
NO_TEXT = 500  # tokens of an item where the public data are no text
MAX_READ = 64 * 2**20  # bytes of public data that are read to measure items


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What nobody knows before the run: one set for each of low, typical and high.

    Attributes:
        turns: Calls of a session that writes a harness; None for `max_turns`.
        decision_turns: Calls of a session that decides.
        frame: Tokens of the agent's own instructions and tools.
        growth: Tokens that a turn adds to the conversation.
        reply: Generated tokens of a turn.
        cache: Share of the conversation so far that is read from the vendor's cache.
        item_calls: Calls of a target for one item.
        shown: Items' worth of text in one such call, examples included.
        answer: Generated tokens of it.
    """

    turns: int | None
    decision_turns: int
    frame: int
    growth: int
    reply: int
    cache: float
    item_calls: int
    shown: int
    answer: int


WIDTH = 200  # of the table; a narrow terminal breaks its lines, the numbers stay whole
LOW = Assumed(
    turns=8, decision_turns=3, frame=3_000, growth=1_000, reply=300, cache=0.9,
    item_calls=1, shown=1, answer=20,
)  # fmt: skip
TYPICAL = Assumed(
    turns=20, decision_turns=6, frame=8_000, growth=1_500, reply=500, cache=0.8,
    item_calls=1, shown=5, answer=200,
)  # fmt: skip
HIGH = Assumed(
    turns=None, decision_turns=15, frame=15_000, growth=3_000, reply=1_000, cache=0.0,
    item_calls=3, shown=9, answer=1_000,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the range depends on.

    Attributes:
        generations, candidates: Of the loop; generation 0 has one candidate.
        max_turns: Of a session; None where the meta backend asks no model.
        given: Tokens that an agent reads in every session: task and harness.
        items: Items of one attempt that a target asks a model about; None where it asks none.
        item: Tokens of one item.
        prices: Of the roles `meta` and `target`; None where a model has no price.
    """

    generations: int
    candidates: int
    max_turns: int | None
    given: int
    items: int | None
    item: int
    prices: Mapping[str, Price | None]

    @property
    def attempts(self) -> int:
        """Candidates of the whole run."""
        return 1 + (self.generations - 1) * self.candidates


def estimate(plan: Plan, assumed: Assumed) -> dict[str, Spend]:
    """What the roles `meta` and `target` spend under one set of assumptions.

    `meta` stands for both roles of the meta backend, `unpriced` for all its calls where the model
    has no price.
    """
    found = {}
    if plan.max_turns is not None:
        turns = min(plan.max_turns, assumed.turns or plan.max_turns)
        proposal = _session(turns, plan.given, assumed)
        decision = _session(min(plan.max_turns, assumed.decision_turns), plan.given, assumed)
        sessions = [(proposal, plan.attempts), (decision, plan.generations - 1)]
        found["meta"] = _spend(sessions, plan.prices.get("meta"))
    if plan.items is not None:
        usage = Usage(
            input_tokens=min(CONTEXT, PROMPT + assumed.shown * plan.item),
            output_tokens=assumed.answer,
        )
        calls = plan.attempts * plan.items * assumed.item_calls
        found["target"] = _spend([((usage,), calls)], plan.prices.get("target"))
    return found


def caps(
    budget: BudgetConfig, low: Spend, high: Spend, generations: int
) -> Iterator[tuple[str, str]]:
    """Each limit that is set, and what it means for a run between these ends."""
    for name, limit, least, most in (
        ("budget.usd", budget.usd, low.cost_usd, high.cost_usd),
        ("budget.tokens", budget.tokens, _tokens(low), _tokens(high)),
        ("budget.requests", budget.requests, low.calls, high.calls),
    ):
        if limit is None:
            continue
        if limit >= most:
            says = "not reached"
        elif limit >= least:
            says = "may end the run early"
        else:
            share = int(generations * limit / least)
            says = f"ends the run after about {share} of {generations} generations, or earlier"
        yield f"{name}={limit:g}", says


def tokens(text: str) -> int:
    """Tokens of a text, roughly: four characters each, and one for each sign beyond ASCII."""
    plain = sum(map(str.isascii, text))
    return -(-plain // 4) + len(text) - plain


def plan_of(
    cfg: Config, task: Task, harness: Path, routes: Mapping[str, tuple[Provider, str]]
) -> Plan:
    """Reads what is known: sizes of the task, its items and the first harness."""
    splits = task.facts.splits
    texts = [task.text, *sorted(path for path in harness.rglob("*") if path.is_file())]
    return Plan(
        generations=cfg.generations,
        candidates=int(OmegaConf.select(cast(DictConfig, cfg), "search.candidates") or 1),
        max_turns=int(OmegaConf.select(cast(DictConfig, cfg), "meta.max_turns") or 1)
        if "meta" in routes
        else None,
        given=sum(tokens(_text(path)) for path in texts),
        items=splits["dev"] + splits["test"] if "target" in routes else None,
        item=_item_tokens(task),
        prices={role: provider.price(model) for role, (provider, model) in routes.items()},
    )


def dry_run(argv: Sequence[str], console: Console) -> None:
    """Prints what `python -m sia` with these arguments would do and what it may cost.

    Raises:
        SiaError: The configuration, or a part of it, cannot be built.
    """
    found = composed(argv)
    cfg = found.cfg
    checked = build.check(cfg)
    task = checked.task
    routes = providers(cfg)
    plan = plan_of(cfg, task, checked.first_harness, routes)

    def say(name: str, text: str) -> None:
        console.print(f"{name:10}{text}", markup=False, highlight=False, soft_wrap=True)

    say("task", f"{task.name} v{task.facts.version}: {task.facts.title}")
    for role, choice in (("meta", found.choices["meta"]), ("target", found.choices["target"])):
        model = f", model {routes[role][1]} of {routes[role][0].name}" if role in routes else ""
        say(role, f"{choice}{model or ', asks no model'}")
    say("loop", f"{plan.generations} generations at most, {plan.attempts} attempts")
    say("sandbox", checked.sandbox.protects)
    budget = cast(DictConfig, cfg.budget)
    limits = [f"{name!s}={value:g}" for name, value in budget.items() if value is not None]
    say("budget", ", ".join(limits) or "no limit")
    if not routes:
        say("cost", "nothing: no model is called")
    elif cfg.gateway.mode == "replay":
        say("cost", f"nothing: {cfg.gateway.recording} answers")
    else:
        _show(console, say, cfg, plan, routes)
        for line in earlier(Path("runs"), found.choices, cfg, plan.generations):
            say("recorded", line)
    say("next", "nothing was run; the same command without --dry-run does it")


def earlier(
    folder: Path, choices: Mapping[str, str], cfg: Config, generations: int
) -> Iterator[str]:
    """What the longest run of the same task and models has really spent, if there is one."""
    try:
        runs = rundir.find_runs(folder)
    except RunDirectoryError:
        return
    found = []
    name = cfg.task.name if cfg.task.source is None else f"{cfg.task.name}@{cfg.task.source}"
    for run in runs:
        info, result = rundir.read_info(run), rundir.read_result(run)
        same = (info.task, info.meta, info.target) == (
            name,
            choices["meta"],
            choices["target"],
        )
        if not same or result is None or not result.spend or result.generations < 1:
            continue
        if _models(OmegaConf.load(run / rundir.CONFIG_FILE)) == _models(cfg):
            found.append((result.generations, info.created_at, run, result))
    if found:
        done, _, run, result = max(found, key=lambda one: one[:2])
        paid = spend.from_record(result.spend)
        cost_usd = generations / done * spend.total(paid).cost_usd
        yield (
            f"{run} spent {spend.line(paid)} in {done} generations. At that rate this run costs "
            f"{spend.usd(cost_usd)}: a better guess than the one above."
        )


def _show(
    console: Console,
    say: Callable[[str, str], None],
    cfg: Config,
    plan: Plan,
    routes: Mapping[str, tuple[Provider, str]],
) -> None:
    guesses = [estimate(plan, assumed) for assumed in (LOW, TYPICAL, HIGH)]
    totals = [sum(guess.values(), Spend()) for guess in guesses]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("low · typical · high")
    for name in ("calls", "input tokens", "output tokens", "USD"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [(role, [guess[role] for guess in guesses]) for role in guesses[0]]
    if len(rows) > 1:
        rows.append(("together", totals))
    for role, spends in rows:
        table.add_row(
            role,
            " · ".join(spend.count(one.calls) for one in spends),
            " · ".join(spend.count(one.input_tokens) for one in spends),
            " · ".join(spend.count(one.output_tokens) for one in spends),
            _money(spends),
        )
    Console(file=console.file, width=WIDTH).print(table)
    if plan.max_turns is not None:
        turns = [min(plan.max_turns, one.turns or plan.max_turns) for one in (LOW, TYPICAL, HIGH)]
        decisions = [min(plan.max_turns, one.decision_turns) for one in (LOW, TYPICAL, HIGH)]
        say(
            "assumed",
            f"{plan.attempts} sessions that write a harness, {_series(turns)} calls each; "
            f"{plan.generations - 1} that decide, {_series(decisions)}; task and harness are "
            f"{plan.given:,} tokens; {LOW.cache:.0%}, {TYPICAL.cache:.0%}, {HIGH.cache:.0%} of a "
            "conversation is read from the vendor's cache",
        )
    if plan.items is not None:
        asked = [one.item_calls for one in (LOW, TYPICAL, HIGH)]
        shown = [one.shown - 1 for one in (LOW, TYPICAL, HIGH)]
        say(
            "assumed",
            f"the harness asks the model about each of {plan.items:,} items of {plan.item:,} "
            f"tokens: {_series(asked)} calls, with {_series(shown)} examples",
        )
    for role, (provider, model) in routes.items():
        if plan.prices.get(role) is None:
            refused = "" if cfg.budget.usd is None else ", and a run with budget.usd is refused"
            say("price", f"{model} has none in provider {provider.name}: no USD here{refused}")
        elif provider.prices_as_of:
            say("price", f"{model}: as of {provider.prices_as_of}")
    limits = list(caps(cfg.budget, totals[0], totals[-1], plan.generations))
    for name, says in limits:
        say("limit", f"{name}: {says}")
    if not limits:
        say("limit", "none is set; budget.usd=5 would end the run at five dollars")


def _session(turns: int, given: int, assumed: Assumed) -> list[Usage]:
    """The calls of one session: every turn sends the conversation so far."""
    calls = []
    for turn in range(turns):
        sent = min(CONTEXT, assumed.frame + given + turn * assumed.growth)
        before = min(CONTEXT, assumed.frame + given + (turn - 1) * assumed.growth) if turn else 0
        calls.append(
            Usage(
                input_tokens=sent,
                cached_tokens=int(assumed.cache * before),
                output_tokens=assumed.reply,
            )
        )
    return calls


def _spend(parts: Sequence[tuple[Sequence[Usage], int]], price: Price | None) -> Spend:
    """What several kinds of sessions spend, each so many times."""
    total = Spend()
    for usages, times in parts:
        calls = times * len(usages)
        total += Spend(
            calls=calls,
            input_tokens=times * sum(usage.input_tokens for usage in usages),
            cached_tokens=times * sum(usage.cached_tokens for usage in usages),
            output_tokens=times * sum(usage.output_tokens for usage in usages),
            cost_usd=times * sum(price.of(usage) for usage in usages) if price else 0.0,
            unpriced=0 if price else calls,
        )
    return total


def _models(cfg: Any) -> list[Any]:
    """What decides about the price of a call."""
    return [
        OmegaConf.select(cfg, key)
        for key in ("meta.model", "target.model", "provider.name", "target.provider.name")
    ]


def _tokens(one: Spend) -> int:
    return one.input_tokens + one.output_tokens


def _series(numbers: Sequence[int]) -> str:
    """`8, 20, 40`; one number where all are equal."""
    return ", ".join(map(str, numbers)) if len(set(numbers)) > 1 else str(numbers[0])


def _money(spends: Sequence[Spend]) -> str:
    if all(one.unpriced == one.calls for one in spends):
        return "no price"
    amounts = " · ".join(spend.usd(one.cost_usd) for one in spends)
    return f"{amounts} + what has no price" if spends[0].unpriced else amounts


def _item_tokens(task: Task) -> int:
    """Tokens of one item, from the public files that are not for training."""
    size = 0
    for path in sorted(task.public_dir.rglob("*")):
        if path.is_file() and not path.name.startswith("train") and path.name != "task.md":
            size += tokens(_text(path))
    items = task.facts.splits["dev"] + task.facts.splits["test"]
    return -(-size // items) if size else NO_TEXT


def _text(path: Path) -> str:
    """The content of a file of text; empty for any other."""
    try:
        return path.read_text("utf-8") if path.stat().st_size <= MAX_READ else ""
    except (OSError, UnicodeDecodeError):
        return ""
