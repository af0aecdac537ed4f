"""`<run>/gateway.sqlite`: every exchange of a run with its models, and what it cost.

The file is in WAL mode with `synchronous=NORMAL`: an exchange that is written survives the death of
the process at any moment (kill -9), a power cut may take the last ones but damages nothing, and
readers never make the gateway wait. Closing the store folds the log into the file, so that the
store of a finished run is this one file. Where a file system cannot have a WAL, SQLite keeps its
rollback journal, with the same promise.

No header of a caller is stored, and of a provider's answer only `HEADERS`.
"""

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sia.errors import RunDirectoryError
from sia.gateway.protocol import Role, Spend

STORE_FILE = "gateway.sqlite"
HEADERS = ("content-type", "request-id", "x-request-id")
BUSY_S = 30.0
BATCH = 50  # exchanges that a reader holds at a time

VERSION = 1

_SCHEMA = f"""
begin;
pragma user_version={VERSION};
create table if not exists sessions (
    id integer primary key, mode text not null, started_at real not null
);
create table if not exists exchanges (
    id integer primary key, session integer not null, scope text not null, role text not null,
    format text not null, provider text not null, requested_model text not null,
    model text not null, served_model text not null, key text not null, exact text not null,
    occurrence integer not null, stream integer not null, status integer not null,
    headers text not null, finish text not null, failure text not null, source text not null,
    input_tokens integer not null, cached_tokens integer not null,
    cache_write_tokens integer not null, output_tokens integer not null,
    estimated integer not null, counted integer not null, cost_usd real,
    attempts integer not null, started_at real not null, wall_s real not null,
    request_zlib blob, body_zlib blob
);
create index if not exists exchanges_by_key on exchanges (key, scope);
create index if not exists exchanges_by_scope on exchanges (scope, session);
create table if not exists misses (
    id integer primary key, session integer not null, scope text not null, at real not null,
    message text not null
);
commit;
"""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One call of a model, as it was answered.

    Attributes:
        id: Place in the store; grows.
        session: Which process of the run, from 1; a resumed run has several.
        scope: The step, for example `g003-c0/target`.
        format: `chat`, `responses`, `messages`, `embeddings` or `count_tokens`.
        requested_model: As the caller wrote it.
        model: The exact id that was asked for.
        served_model: As the vendor wrote it; empty if it did not.
        key: Equal for requests that are the same but for what differs between any two runs; see
            `sia.gateway.matching`.
        exact: Equal for requests that are the same to the letter.
        occurrence: How many requests of the same key its scope had made before in its session.
        status: Of the answer that the caller got.
        headers: Those of the answer that matter.
        finish: The vendor's word for why it stopped.
        failure: Why the answer was of no use; empty for a usable one.
        source: What answered: empty for the provider, `store` for an earlier session of the run,
            `recording` for another run, `cache`.
        estimated: Tokens are guessed from the length of the texts; the vendor did not count.
        counted: The call is one for budgets and `Spend`.
        cost_usd: None where the model has no price.
        attempts: How often it was sent.
        started_at: Seconds since 1970.
        wall_s: From the arrival of the request to the last byte of the answer.
    """

    id: int
    session: int
    scope: str
    role: Role
    format: str
    provider: str
    requested_model: str
    model: str
    served_model: str
    key: str
    exact: str
    occurrence: int
    stream: bool
    status: int
    headers: Mapping[str, str]
    finish: str
    failure: str
    source: str
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    estimated: bool
    counted: bool
    cost_usd: float | None
    attempts: int
    started_at: float
    wall_s: float
    request_zlib: bytes | None = field(repr=False)
    body_zlib: bytes | None = field(repr=False)

    @property
    def replayed(self) -> bool:
        """Whether a recording answered, for free."""
        return bool(self.source)

    def request(self) -> Any:
        """The request as JSON, with the exact id of the model; None in mode `live`."""
        return None if self.request_zlib is None else json.loads(zlib.decompress(self.request_zlib))

    def body(self) -> bytes:
        """The bytes of the answer that the caller got; empty in mode `live`."""
        return b"" if self.body_zlib is None else zlib.decompress(self.body_zlib)

    def spend(self) -> Spend:
        """What this call adds to the spending of its role."""
        if not self.counted:
            return Spend()
        if self.replayed:
            return Spend(replayed=1)
        return Spend(
            calls=int(not self.failure),
            failed=int(bool(self.failure)),
            input_tokens=self.input_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            cost_usd=self.cost_usd or 0.0,
            unpriced=int(self.cost_usd is None),
        )


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A request that a replay had no answer for."""

    id: int
    session: int
    scope: str
    at: float
    message: str


_COLUMNS = tuple(f.name for f in fields(Exchange))
_INSERT = (
    f"insert into exchanges ({', '.join(_COLUMNS[1:])}) "
    f"values ({', '.join('?' * (len(_COLUMNS) - 1))})"
)
_SELECT = f"select {', '.join(_COLUMNS)} from exchanges"


class Store:
    """The store that this process writes to. Not for several threads at once."""

    def __init__(self, path: Path, *, mode: str, now: float) -> None:
        """Opens or creates the store and begins a session.

        Raises:
            RunDirectoryError: It cannot be written, or is no store.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=normal")
            _check_version(self._db, path)
            self._db.executescript(_SCHEMA)
            begun = self._db.execute(
                "insert into sessions (mode, started_at) values (?, ?)", (mode, now)
            )
        except (sqlite3.Error, OSError) as error:
            raise self._unwritable(error) from error
        self.session = int(begun.lastrowid or 0)

    def add(self, exchange: Exchange) -> int:
        """Writes an exchange and gives its id; on return it survives kill -9.

        Raises:
            RunDirectoryError: The disk is full or gone.
        """
        row = [_storable(getattr(exchange, name)) for name in _COLUMNS[1:]]
        try:
            return int(self._db.execute(_INSERT, row).lastrowid or 0)
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def miss(self, scope: str, message: str, now: float) -> None:
        """Keeps what a replay had no answer for."""
        self._db.execute(
            "insert into misses (session, scope, at, message) values (?, ?, ?, ?)",
            (self.session, scope, now, message),
        )

    @property
    def reader(self) -> sqlite3.Connection:
        """The connection, to look up what this store holds."""
        return self._db

    def _unwritable(self, error: Exception) -> RunDirectoryError:
        return RunDirectoryError(
            f"Cannot write {self._path}: {error}. What was paid for before is kept: free some "
            "space or mend the folder, then go on with resume=<run>."
        )

    def close(self) -> None:
        """Folds the log into the file, unless somebody is reading."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._db.execute("pragma busy_timeout=0")
            self._db.execute("pragma journal_mode=delete")
        self._db.close()


def open_reader(path: Path) -> sqlite3.Connection | None:
    """A connection that cannot write, or None if there is no store (yet).

    Raises:
        RunDirectoryError: The store is damaged, or of another version.
    """
    if not path.is_file():
        return None
    db: sqlite3.Connection | None = None
    failure: sqlite3.Error | None = None
    # A log beside a store in a folder without write access cannot be opened, only left aside.
    for way in ("mode=ro", "immutable=1"):
        try:
            db = sqlite3.connect(
                f"{path.absolute().as_uri()}?{way}",
                uri=True,
                timeout=BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
            if _check_version(db, path):
                return db
            break
        except sqlite3.OperationalError as error:
            failure = error
        except sqlite3.DatabaseError as error:
            failure = error
            break
    if db is not None:
        db.close()
    if failure is None:
        return None
    raise RunDirectoryError(f"{path} cannot be read: {failure}") from failure


def _storable(value: Any) -> Any:
    """A value as SQLite takes it; half a character, which it refuses, becomes a question mark."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return json.dumps(value) if isinstance(value, Mapping) else value


def _check_version(db: sqlite3.Connection, path: Path) -> bool:
    """Whether a store is there; False for an empty file."""
    (version,) = db.execute("pragma user_version").fetchone()
    if version not in (0, VERSION):
        raise RunDirectoryError(
            f"{path} is a store of version {version}; this SIA knows version {VERSION}."
        )
    return bool(version)


def select(db: sqlite3.Connection, where: str, *values: Any) -> list[Exchange]:
    """The exchanges for which `where` holds, and whatever order or limit it ends with."""
    return [_exchange(row) for row in db.execute(f"{_SELECT} where {where}", values)]


def read_exchanges(path: Path, after_id: int = 0) -> Iterator[Exchange]:
    """The exchanges of a store in the order in which they ended; none if there is no store.

    Works while the run writes; `after_id` goes on where a reader stopped.
    """
    if (db := open_reader(path)) is not None:
        with contextlib.closing(db):
            while batch := select(db, "id > ? order by id limit ?", after_id, BATCH):
                yield from batch
                after_id = batch[-1].id


def read_misses(path: Path) -> list[Miss]:
    """What a replay had no answer for; nothing if there is no store."""
    if (db := open_reader(path)) is None:
        return []
    with contextlib.closing(db):
        rows = db.execute("select id, session, scope, at, message from misses order by id")
        return [
            Miss(id=row[0], session=row[1], scope=row[2], at=row[3], message=row[4]) for row in rows
        ]


def read_spend(path: Path) -> dict[Role, Spend]:
    """What each role has spent over all sessions; empty if there is no store."""
    if (db := open_reader(path)) is None:
        return {}
    with contextlib.closing(db):
        return spend_in(db)


def read_scopes(path: Path) -> dict[tuple[str, Role], Spend]:
    """What each role has spent in each scope, by the order of first calls; empty without a store.

    No texts are read, so it takes little time also for a large store.
    """
    if (db := open_reader(path)) is None:
        return {}
    with contextlib.closing(db):
        rows = _sums(db, "scope, role", "min(id)")
        return {(scope, Role(role)): _spend(sums) for scope, role, *sums in rows}


def spend_in(db: sqlite3.Connection) -> dict[Role, Spend]:
    """What each role has spent, by an open store."""
    return {Role(role): _spend(sums) for role, *sums in _sums(db, "role", "role")}


def _sums(db: sqlite3.Connection, by: str, order: str) -> sqlite3.Cursor:
    """The groups, each followed by the numbers of `Spend`."""
    return db.execute(
        f"select {by}, sum(source = '' and failure = ''), sum(source = '' and failure != ''),"
        " sum(source != ''), sum((source = '') * input_tokens), sum((source = '') * cached_tokens),"
        " sum((source = '') * output_tokens), sum((source = '') * coalesce(cost_usd, 0)),"
        " sum(source = '' and cost_usd is null)"
        f" from exchanges where counted group by {by} order by {order}"
    )


def _spend(sums: list[Any]) -> Spend:
    return Spend(**dict(zip(vars(Spend()), sums, strict=True)))


def _exchange(row: tuple[Any, ...]) -> Exchange:
    data = dict(zip(_COLUMNS, row, strict=True))
    for name in ("stream", "estimated", "counted"):
        data[name] = bool(data[name])
    data["role"] = Role(data["role"])
    data["headers"] = json.loads(data["headers"])
    return Exchange(**data)
