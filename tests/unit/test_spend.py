import io
from pathlib import Path

import pytest
from rich.console import Console

from sia import spend
from sia.gateway.protocol import Role, Spend
from sia.records import RunResult, from_json, to_json

SPENT = {
    Role.TARGET: Spend(calls=1713, failed=2, input_tokens=1_200_000, output_tokens=3_400,
                       unpriced=3, cost_usd=0.5),
    Role.META: Spend(calls=12, replayed=4, input_tokens=90_000, cached_tokens=60_000,
                     output_tokens=8_000, cost_usd=1.25),
}  # fmt: skip


def shown(found: dict[Role, Spend]) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=120).print(spend.table(found))
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_the_table_has_a_row_for_each_role_and_their_sum() -> None:
    assert shown(SPENT) == [
        "model calls calls failed replayed input cached output USD",
        "meta 12 0 4 90,000 60,000 8,000 $1.2500",
        "target 1,713 2 0 1,200,000 0 3,400 $0.5000 + 3 without a price",
        "together 1,725 2 4 1,290,000 60,000 11,400 $1.7500 + 3 without a price",
    ]


def test_one_role_needs_no_sum_and_no_price_is_no_zero() -> None:
    (_, row) = shown({Role.META: Spend(calls=2, unpriced=2, input_tokens=5)})
    assert row == "meta 2 0 0 5 0 0 no price"


def test_the_record_of_a_run_holds_plain_numbers_and_comes_back() -> None:
    result = RunResult(status="finished", reason="", spend=spend.as_record(SPENT))
    data = to_json(result)
    again = from_json(data, RunResult)
    assert to_json(again) == data
    assert spend.from_record(again.spend) == SPENT
    assert list(result.spend) == ["meta", "target"]


def test_a_result_of_before_there_were_calls_is_read() -> None:
    assert from_json('{"status": "finished", "reason": ""}', RunResult).spend == {}


def test_a_run_without_a_gateway_has_spent_nothing(tmp_path: Path) -> None:
    assert spend.of_run(tmp_path) == {}
    assert spend.line({}) == ""


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (1_234, "1.2k"), (56_789, "57k"), (3.4e6, "3.4M")]
)
def test_counts_are_short(number: float, text: str) -> None:
    assert spend.count(number) == text


def test_the_line_says_money_and_tokens() -> None:
    assert spend.line({Role.META: SPENT[Role.META]}) == "$1.2500, 98k tokens"
    assert spend.usd(1234.5) == "$1,234.50"
