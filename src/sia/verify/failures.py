"""Which dev failures a meta backend may be shown: few, diverse, and always of the same items."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from sia.records import Failure
from sia.tasks.task import Metric

MAX_FAILURES = 20
MAX_ANSWER = 200  # characters
# Only so many items of a split can ever be shown, the same ones in every generation. A wrong answer
# to a question with two answers gives the right one away: this bounds what can be learnt by heart.
WINDOW_SHARE = 1 / 8
MIN_WINDOW = 40


def sample_failures(
    items: Mapping[str, float], answers: Mapping[str, str], metric: Metric
) -> tuple[Failure, ...]:
    """At most `MAX_FAILURES` items that scored less than the best, one per distinct answer in turn.

    A function of the ids, scores and answers; their order does not matter. Items that are not in
    `items` are never shown.

    Args:
        items: Score of each item.
        answers: What the target said, where it gave a usable answer.
        metric: Tells what the best score is.
    """
    window = max(MIN_WINDOW, int(len(items) * WINDOW_SHARE))
    by_answer: dict[str, list[str]] = defaultdict(list)
    for item in sorted(items, key=_hash)[:window]:
        if metric.better(metric.best, items[item]):
            by_answer[answers.get(item, "")].append(item)
    groups = sorted(by_answer.values(), key=lambda group: (-len(group), _hash(group[0])))
    turns = sorted(
        (turn, position, item)
        for position, group in enumerate(groups)
        for turn, item in enumerate(group)
    )
    return tuple(
        Failure(item=item, answer=_shown(answers.get(item, "")), score=items[item])
        for _, _, item in turns[:MAX_FAILURES]
    )


def _shown(answer: str) -> str:
    # A lone surrogate has no place in a record: it cannot be written as UTF-8.
    return answer[:MAX_ANSWER].encode("utf-8", "replace").decode()


def _hash(item: str) -> str:
    return hashlib.sha256(item.encode("utf-8", "surrogatepass")).hexdigest()
