"""What the model calls of a run have cost, by role: for people and for `result.json`."""

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from sia.gateway.protocol import Role, Spend
from sia.gateway.store import STORE_FILE, read_misses, read_spend


def of_run(run: Path) -> dict[Role, Spend]:
    """What is recorded in a run directory; empty where no model was called."""
    return read_spend(run / STORE_FILE)


def unanswered(run: Path) -> list[str]:
    """What a replay had no answer for: one message per request, in order."""
    return [miss.message for miss in read_misses(run / STORE_FILE)]


def total(spend: Mapping[Role, Spend]) -> Spend:
    """All roles together."""
    return sum(spend.values(), Spend())


def as_record(spend: Mapping[Role, Spend]) -> dict[str, dict[str, int | float]]:
    """Plain numbers by role, in the order of `Role`."""
    return {role.value: dict(vars(spend[role])) for role in Role if role in spend}


def from_record(record: Mapping[str, Mapping[str, int | float]]) -> dict[Role, Spend]:
    """Inverse of `as_record`."""
    return {
        Role(role): Spend(
            **{name: value if name == "cost_usd" else int(value) for name, value in numbers.items()}  # type: ignore[arg-type]  # counts are whole
        )
        for role, numbers in record.items()
    }


def table(spend: Mapping[Role, Spend]) -> Table:
    """One row per role, and their sum where there are several."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("model calls")
    for name in ("calls", "failed", "replayed", "input", "cached", "output", "USD"):
        shown.add_column(name, justify="right", no_wrap=True)
    rows = [(role.value, spend[role]) for role in Role if role in spend]
    if len(rows) > 1:
        rows.append(("together", total(spend)))
    for name, one in rows:
        counts = (
            one.calls, one.failed, one.replayed, one.input_tokens, one.cached_tokens,
            one.output_tokens,
        )  # fmt: skip
        shown.add_row(name, *(f"{count:,}" for count in counts), _priced(one))
    return shown


def line(spend: Mapping[Role, Spend]) -> str:
    """Money and tokens on one short line; empty where nothing was called."""
    if not spend:
        return ""
    one = total(spend)
    return f"{_priced(one)}, {count(one.input_tokens + one.output_tokens)} tokens"


def usd(amount: float) -> str:
    """`$0.0103`, `$12.30`: digits that matter at the size of a bill."""
    return f"${amount:,.2f}" if amount >= 10 else f"${amount:.4f}"


def count(number: float) -> str:
    """`950`, `12k`, `3.4M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.0f}{letter}" if scaled >= 10 else f"{scaled:.1f}{letter}"
    return f"{number:.0f}"


def _priced(one: Spend) -> str:
    if not one.unpriced:
        return usd(one.cost_usd)
    if one.unpriced >= one.calls and not one.cost_usd:
        return "no price"
    return f"{usd(one.cost_usd)} + {one.unpriced:,} without a price"
