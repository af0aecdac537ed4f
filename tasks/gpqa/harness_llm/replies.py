"""What a reply means, and the trajectory that shows it to whoever improves the harness.

The same file in every language-model harness of SIA.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from model import Message, Reply

TRAJECTORIES_BYTES = 48 * 2**20  # of all files together; the sandbox takes 64 MiB
MAX_TRAJECTORY_BYTES = 2**18

# Not \W, which would cross lines: a reply of a million blank lines would take for ever.
_ANSWER = re.compile(
    r"^[^\w\n]*(?:(?:final )?answer|答案)[^\w\n]*?[:：](.*)$", re.IGNORECASE | re.MULTILINE
)
_MARKS = str.maketrans("", "", "[]()【】〔〕{}<>《》「」『』\"'“”‘’*`_#$\\")


def final_answer(text: str) -> str:
    """What stands behind the last `Answer:` of a reply; empty where there is none."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else ""


def canonical(text: str) -> str:
    """A form in which two spellings of one label are equal.

    Width of characters, case, blanks, brackets, quotes, Markdown and a full stop do not count.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_MARKS)
    return "".join(folded.split()).replace(",", "、").rstrip("。.")


def exact_label(answer: str, labels: Iterable[str]) -> str:
    """The one label that an answer spells; empty for anything else, two labels for example."""
    wanted = canonical(answer)
    found = [label for label in labels if wanted and canonical(label) == wanted]
    return found[0] if len(found) == 1 else ""


class Trajectories:
    """Writes `agent_execution/execution_q<item>.json` for each of `n_items` items.

    Messages that are too long for their share of the space lose their middle.
    """

    def __init__(self, working_dir: Path, n_items: int) -> None:
        self._folder = working_dir / "agent_execution"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bytes = min(MAX_TRAJECTORY_BYTES, TRAJECTORIES_BYTES // max(n_items, 1))

    def write(
        self, item: str, calls: Sequence[tuple[Sequence[Message], Reply]], verdict: str
    ) -> None:
        """The messages of an item's calls, what was replied, and what was made of it."""
        messages: list[Message] = []
        for prompt, reply in calls:
            end = " (cut at max_tokens)" if reply.cut else ""
            said = f"(no reply: {reply.error})" if reply.error else reply.text + end
            messages += [*prompt, {"role": "assistant", "content": said}]
        messages.append({"role": "tool", "content": verdict})
        text = json.dumps(messages, ensure_ascii=False, indent=1)
        if len(text.encode()) > self._bytes:
            room = self._bytes // (6 * len(messages))  # a character has up to six bytes in JSON
            short = [{**m, "content": _shortened(m["content"], room)} for m in messages]
            text = json.dumps(short, ensure_ascii=False, indent=1)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", item)[:100]
        (self._folder / f"execution_q{name}.json").write_text(text, encoding="utf-8")


def _shortened(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    half = room // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters … {text[len(text) - half :]}"
