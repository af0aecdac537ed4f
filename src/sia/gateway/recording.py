"""What was answered before: by this run, by another run, or for anybody."""

import re
import sqlite3
from difflib import SequenceMatcher
from pathlib import Path

from sia.errors import ProviderError
from sia.gateway.matching import Digest, canonical
from sia.gateway.store import STORE_FILE, Exchange, open_reader, select

COMPARED = 200  # recorded requests among which the nearest one is looked for
WORD = re.compile(r"\w+|[^\w\s]")
SHOWN = 160  # characters of a line that differs


class Recording:
    """Answers of one store, each given once to each scope. For one thread.

    The n-th request of a key gets the n-th answer of that key; one that is the same to the letter
    comes before one that is not.

    Attributes:
        source: What `Exchange.source` says of an answer that comes from here.
        path: The store.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, source: str, *, before: int = 0) -> None:
        """Answers from `db`.

        Args:
            db: Open connection to the store.
            path: The store.
            source: `store`: what earlier sessions of the same scope were given and could use;
                `recording`: what the last session of the same scope was given, failures included,
                and after that what earlier sessions could use; `cache`: any usable answer.
            before: The first session that is not a part of the recording; 0: all are.
        """
        self._db = db
        self.source = source
        self.path = path
        self._before = before or 1 << 62
        self._given: dict[str, set[int]] = {}
        self._last: dict[str, int] = {}

    def find(self, scope: str, digest: Digest, provider: str) -> Exchange | None:
        """The answer to the next request of its kind; None if there is none left."""
        given = self._given.get(scope, set())
        left = [row for row in self._candidates(scope, digest.key, provider) if row[0] not in given]
        if not left:
            return None
        chosen = next((row for row in left if row[1] == digest.exact), left[0])[0]
        self.give(scope, chosen)
        return select(self._db, "id = ?", chosen)[0]

    def give(self, scope: str, id: int) -> None:
        """Notes that a scope has had an answer: its next request of the kind is another one."""
        self._given.setdefault(scope, set()).add(id)

    def close(self) -> None:
        """Closes the store."""
        self._db.close()

    def _candidates(self, scope: str, key: str, provider: str) -> list[tuple[int, str]]:
        """Ids and exact digests of the answers to a key, in the order in which they are due."""
        if self.source == "cache":
            return self._db.execute(
                "select id, exact from exchanges where key = ? and provider = ? and failure = ''"
                " and body_zlib is not null order by id",
                (key, provider),
            ).fetchall()
        rows = self._db.execute(
            "select id, exact, session, failure, source from exchanges where key = ? and scope = ?"
            " and session < ? and body_zlib is not null order by session, occurrence",
            (key, scope, self._before),
        ).fetchall()
        if self.source == "store":
            return [row[:2] for row in rows if not row[3] and row[4] != "store"]
        last = self._last_session(scope)
        seen = [row for row in rows if row[2] == last]
        # The last session repeated the first answers of the earlier ones.
        repeated = sum(row[4] == "store" for row in seen)
        earlier = [row for row in rows if row[2] != last and not row[3] and row[4] != "store"]
        return [row[:2] for row in seen + earlier[repeated:]]

    def _last_session(self, scope: str) -> int:
        if scope not in self._last:
            (found,) = self._db.execute(
                "select max(session) from exchanges where scope = ?", (scope,)
            ).fetchone()
            self._last[scope] = found or 0
        return self._last[scope]


def open_recording(path: Path) -> Recording:
    """The recording of another run: its directory, or the store in it.

    Raises:
        ProviderError: There is none, or it holds no answers.
    """
    store = path / STORE_FILE if path.is_dir() else path
    db = open_reader(store)
    if db is None:
        raise ProviderError(
            f"gateway.mode=replay: {store} does not exist. Give the directory of a recorded run: "
            "gateway.recording=runs/..."
        )
    if not db.execute("select 1 from exchanges where body_zlib is not null limit 1").fetchone():
        raise ProviderError(
            f"gateway.mode=replay: {store} holds no answers; a run with gateway.mode=live keeps "
            "none. Record one: gateway.mode=record"
        )
    return Recording(db, store, "recording")


def explain_miss(store: Path, scope: str, wire: str, request: object) -> str:
    """Why a replay has no answer to a request: the nearest recorded one, and where they differ.

    Opens its own connection, so that it can run beside the gateway.
    """
    db = open_reader(store)
    assert db is not None, store
    try:
        (total,) = db.execute(
            "select count(*) from exchanges where scope = ? and format = ?", (scope, wire)
        ).fetchone()
        recorded = select(
            db,
            "scope = ? and format = ? and request_zlib is not null order by id desc limit ?",
            scope, wire, COMPARED,
        )  # fmt: skip
        if not recorded:
            scopes = [
                row[0]
                for row in db.execute("select distinct scope from exchanges order by scope limit 6")
            ]
            return (
                f"the recording {store} has no {wire} request of {scope}; "
                f"it has {', '.join(scopes)}"
            )
    finally:
        db.close()
    now = canonical(request)
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(WORD.findall(now))

    def likeness(text: str) -> float:
        matcher.set_seq1(WORD.findall(text))
        return matcher.quick_ratio()  # the same words, wherever they are

    texts = [(canonical(exchange.request()), exchange.id) for exchange in recorded]
    nearest, number = max(texts, key=lambda text: likeness(text[0]))
    start = f"the recording {store} has no answer left for this {wire} request of {scope}"
    if nearest == now:
        return f"{start}: exchange {number} is the same request, but what it got is used up"
    line, then_line, now_line = _first_difference(nearest.splitlines(), now.splitlines())
    return (
        f"{start}. The nearest of {total} there is exchange {number}; line {line} differs:\n"
        f"  recorded: {then_line}\n  now:      {now_line}"
    )


def _first_difference(then: list[str], now: list[str]) -> tuple[int, str, str]:
    """Number and both texts of the first line that differs, cut around the place."""
    index = next(
        (i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b),
        min(len(then), len(now)),
    )
    one, two = (lines[index].strip() if index < len(lines) else "" for lines in (then, now))
    same = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
        min(len(one), len(two)),
    )
    start = max(0, same - SHOWN // 2)
    cut = [
        ("..." if start else "")
        + text[start : start + SHOWN]
        + ("..." if len(text) > start + SHOWN else "")
        for text in (one, two)
    ]
    return index + 1, cut[0], cut[1]
