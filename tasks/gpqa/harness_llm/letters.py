"""From the reply of a model to one of four letters, or to none."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from model import Reply
from replies import canonical, exact_label, final_answer

LETTERS = ("A", "B", "C", "D")

_LETTER = re.compile(r"[\s*_`\"'(\[$]*([ABCD])[\s*_`\"')\].:$]*")
_LETTER_AND_OPTION = re.compile(r"[\s*_`\"'(\[$]*([ABCD])[\s*_`\"')\].:,$-]+(.+)")


def letter_of(text: str, options: Mapping[str, str]) -> str:
    """The letter that an answer names: alone, before its own option, or by that option's words.

    Two letters, a letter beside another one's option, and whatever else stands there are nobody's
    answer: empty.

    Args:
        text: What stands in the answer line.
        options: Letter -> option, as they were shown.
    """
    if alone := _LETTER.fullmatch(text):
        return alone[1]
    both = _LETTER_AND_OPTION.fullmatch(text)
    if both and canonical(both[2]) == canonical(options[both[1]]):
        return both[1]
    named = exact_label(text, options.values())
    return next((letter for letter, option in options.items() if option == named), "")


def spoken(reply: Reply, options: Mapping[str, str]) -> str:
    """The letter in the last `Answer:` line; a reply of one bare letter counts as well."""
    bare = _LETTER.fullmatch(reply.text)
    return bare[1] if bare else letter_of(final_answer(reply.text), options)


def likeliest(reply: Reply) -> str:
    """The letter that the model gave most probability as its first token; empty without one.

    Spellings of a letter (` A`, `(A`) are added up. Not every endpoint returns probabilities.
    """
    try:
        tops: Sequence[Mapping[str, Any]] = reply.choice["logprobs"]["content"][0]["top_logprobs"]
        mass = dict.fromkeys(LETTERS, 0.0)
        for top in tops:
            if found := _LETTER.fullmatch(top["token"]):
                mass[found[1]] += math.exp(top["logprob"])
    except (LookupError, TypeError, ValueError, OverflowError):
        return ""
    best = max(LETTERS, key=lambda letter: mass[letter])
    return best if mass[best] > 0 and list(mass.values()).count(mass[best]) == 1 else ""


def majority(votes: Sequence[str]) -> str:
    """The most frequent letter, the earlier one among equals; empty where nobody voted."""
    counts = Counter(vote for vote in votes if vote)
    return max(counts, key=lambda vote: counts[vote], default="")
