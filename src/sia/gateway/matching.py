"""When two requests are the same request.

Two honest runs of the same thing do not send the same bytes. What is removed before requests are
compared, and nothing else:

- members of the request that name the caller or steer only the vendor's bookkeeping (`IGNORED`),
  and `cache_control` anywhere;
- ids that link a tool's call to its result: numbered in the order in which they appear;
- in all text: UUIDs and the same 32 digits without dashes, dates and times as ISO 8601 and as `ls`
  and `date` write them, what follows "today's date" and its like, throw-away keys, the kernel that
  the Claude CLI names and its temporary files, and what a sandbox draws anew: the marker of an
  attempt and the user id of its slot.

The last group could make two different questions look alike that differ in a date only. So a
request has two digests: `exact` leaves text alone, `key` does not. Among recorded requests with the
same key, one that is the same exactly comes first.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

KEY_PREFIX = "sia-"
KEY_DIGITS = 40

IGNORED = frozenset(
    {
        "metadata",
        "model",  # a part of the digest by its exact id
        "prompt_cache_key",
        "request_id",
        "safety_identifier",
        "session_id",
        "user",
    }
)
LINKS = frozenset({"call_id", "tool_call_id", "tool_use_id"})
CALLS = frozenset({"function", "function_call", "tool_use", "server_tool_use"})

# They run over JSON text, where a line ends at a backslash. Conversations are long and this happens
# for every call: each pattern begins with something that is rare and found fast, and those that do
# not are only used if a cheaper one finds something.
_DIGIT = "[0-9a-f]"
_MOVING = (
    ("<key>", re.compile(rf"{KEY_PREFIX}{_DIGIT}{{{KEY_DIGITS}}}")),
    ("<today>", re.compile(r"oday(?:'?s date| is)[^\\\".]{0,60}")),
    ("<today>", re.compile(r"urrent (?:date|time)[^\\\".]{0,60}")),
    ("OS Version: <kernel>", re.compile(r"OS Version: [^\\\"]+")),
    (".tmp.<temporary>", re.compile(rf"\.tmp\.\d+\.{_DIGIT}{{12}}")),
    ("SIA_ATTEMPT=<marker>", re.compile(rf"SIA_ATTEMPT={_DIGIT}+")),
    ("<uid>", re.compile(r"64[1-8]\d\d(?!\d)")),  # sia.sandbox.launch.FIRST_UID and those after it
    (
        "<uuid>",
        re.compile(
            rf"{_DIGIT}{{8}}(?:(?:-{_DIGIT}{{4}}){{3}}-{_DIGIT}{{12}}|{_DIGIT}{{24}})(?!{_DIGIT})"
        ),
    ),
    (
        "<time>",
        re.compile(
            r"\d{4}-\d\d-\d\d(?!\d)"
            r"(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?(?: ?(?:Z|UTC|[+-]\d\d:?\d\d))?)?"
        ),
    ),
)
_CLOCK = re.compile(r" \d\d:\d\d")
_LISTED = re.compile(
    r"(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) )?"
    r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) {1,2}\d{1,2}"
    r" \d\d:\d\d(?::\d\d)?(?: UTC)?(?: \d{4})?"
)


@dataclass(frozen=True, kw_only=True)
class Digest:
    """What a request is recognised by; see the module."""

    key: str
    exact: str


def digest(wire: str, model: str, request: Any) -> Digest:
    """The two digests of a request of a wire format to the model of this exact id."""
    text = json.dumps(_fixed(request, {}), sort_keys=True, separators=(",", ":"))
    return Digest(
        key=hashlib.sha256(f"{wire} {model} {_settled(text)}".encode()).hexdigest(),
        exact=hashlib.sha256(f"{wire} {model} {text}".encode()).hexdigest(),
    )


def canonical(request: Any) -> str:
    """The text that is compared, spread over lines for a reader."""
    text = json.dumps(_fixed(request, {}), sort_keys=True, indent=1)
    return _settled(text)


def _settled(text: str) -> str:
    """Text without what moves."""
    for name, pattern in _MOVING:
        text = pattern.sub(name, text)
    return _LISTED.sub("<time>", text) if _CLOCK.search(text) else text


def _fixed(value: Any, links: dict[str, str], *, top: bool = True) -> Any:
    """A copy of a request without what differs by its place in the structure."""
    if isinstance(value, list):
        return [_fixed(item, links, top=False) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("type")  # in the schema of a tool, "type" may be a property with a schema
    call = isinstance(kind, str) and kind in CALLS
    fixed = {}
    for name, item in value.items():
        if name == "cache_control" or (top and name in IGNORED):
            continue
        if isinstance(item, str) and (name in LINKS or (call and name == "id")):
            fixed[name] = links.setdefault(item, f"call-{len(links)}")
        else:
            fixed[name] = _fixed(item, links, top=False)
    return fixed
