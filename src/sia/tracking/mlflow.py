"""Writes a run directory to MLflow. The only module that imports MLflow.

    with opened(run, location) as mirror:
        mirror.update()     writes the generations that the journal has closed since, with the
                            traces of their model calls
        mirror.close()      writes the sealed test, calls that no generation was closed for, and
                            the run's status

MLflow's runs are found by their tags, the ids of traces and spans are functions of what they show,
a generation's run is terminated after all else is written, and times come from the journal. So it
may stop anywhere, and the next call completes the work.
"""

import fcntl
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow's own seven retries keep a user waiting for minutes on a server that is not there.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunStatus,
    Span,
    TraceInfo,
    TraceLocation,
    TraceState,
)
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracing.client import TracingClient
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from sia.rundir import RUN_FILE, is_held, read_result
from sia.tracking import experiment
from sia.tracking.calls import CallsView, ScopeCalls
from sia.tracking.lineage import PolicyView
from sia.tracking.location import Location, TrackingError, first_line
from sia.tracking.view import DatasetView, GenerationView, ParentView, RunView

INIT_TIMEOUT_S = 120.0  # a new database takes about 5 s
MIRROR_TIMEOUT_S = 5.0  # for the follower of an earlier session to end
BATCH = 20  # generations whose parent metrics are written together
SOURCE_RUN = "mlflow.sourceRun"
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Mirror:
    """One run directory in MLflow. Make it with `opened`."""

    def __init__(self, view: RunView, location: Location) -> None:
        """Finds what MLflow holds of this run, or creates its parent run."""
        self._view = view
        self._client = MlflowClient(tracking_uri=location.uri)
        # The fluent API draws ids of its own; with ours a trace that is written again is the same.
        self._tracing = TracingClient(tracking_uri=location.uri)
        parent = view.parent()
        self._experiment = _experiment(self._client, parent.experiment, location)
        runs = self._search()
        found = next((run for run in runs if "sia.generation" not in run.data.tags), None)
        self._parent: Run = found or self._client.create_run(
            self._experiment, parent.started_ms, _tags(parent.tags), parent.name
        )
        self._complete(parent)
        self._children: dict[int, Run] = {}
        for run in runs:
            if run.data.tags.get("mlflow.parentRunId") == self._parent_id:
                self._children[int(run.data.tags["sia.generation"])] = run
        self._run_ids = {index: str(run.info.run_id) for index, run in self._children.items()}
        self._calls = CallsView(view.path, view.info.run_id)
        self._calls.read()
        self._traced = self._known_traces() if self._calls.scopes() else {}
        self._paid = dict(self._parent.data.metrics)
        self._done = {
            index
            for index, run in self._children.items()
            if RunStatus.is_terminated(RunStatus.from_string(run.info.status))
        }

    @property
    def _parent_id(self) -> str:
        return str(self._parent.info.run_id)

    def update(self) -> int:
        """Writes the generations that were closed since the last call; returns how many."""
        written = 0
        closed = self._view.closed(self._done)
        while batch := list(islice(closed, BATCH)):
            self._calls.read()  # after the journal: calls are recorded before their step ends
            totals = []
            for generation in batch:
                self._write(generation)
                self._write_traces(generation.index)
                paid = self._calls.totals(generation.index)
                self._paid |= paid
                totals += [
                    Metric(name, value, generation.ended_ms, generation.index)
                    for name, value in {**generation.totals, **paid}.items()
                ]
            self._client.log_batch(self._parent_id, metrics=totals)
            for generation in batch:
                status = "FAILED" if generation.failed else "FINISHED"
                run_id = self._children.pop(generation.index).info.run_id
                self._client.set_terminated(run_id, status, generation.ended_ms)
                self._done.add(generation.index)
            written += len(batch)
        return written

    def reopen(self) -> None:
        """Shows the run as running again; for a resumed run."""
        self._set_status("RUNNING")

    def close(self, *, ended: bool) -> None:
        """Writes the sealed test, calls that are left, and the run's status.

        Args:
            ended: The process of the run is known to be gone, or about to go.
        """
        known = self._parent.data.metrics
        exam = {name: v for name, v in self._view.exam().items() if known.get(name) != v}
        if exam:
            moment = self._view.ended_ms
            metrics = [Metric(name, value, moment, 0) for name, value in exam.items()]
            self._client.log_batch(self._parent_id, metrics=metrics)
        self._write_left_calls()
        result = read_result(self._view.path)
        if result is not None:
            self._set_status(STATUS[result.status])
        elif self._view.ended:
            self._set_status("FINISHED")
        else:
            self._set_status("KILLED" if ended or not is_held(self._view.path) else "RUNNING")

    def _search(self) -> list[Run]:
        """All MLflow runs of this run, oldest first."""
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment],
                f"tags.`sia.run_id` = '{self._view.info.run_id}'",
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _complete(self, parent: ParentView) -> None:
        """Writes the parent's files and params; params come last and say that all is there."""
        known = self._parent.data.params
        missing = [Param(name, v) for name, v in parent.params.items() if name not in known]
        if missing:
            self._write_files(self._parent, parent.files)
            self._write_datasets(self._parent, parent.datasets)
            self._client.log_batch(self._parent_id, params=missing)

    def _write(self, generation: GenerationView) -> None:
        run = self._children.get(generation.index)
        if run is None:
            tags = _tags({**generation.tags, "mlflow.parentRunId": self._parent_id})
            run = self._client.create_run(
                self._experiment, generation.started_ms, tags, generation.name
            )
            self._children[generation.index] = run
            self._run_ids[generation.index] = str(run.info.run_id)
        self._write_files(run, generation.files)
        self._write_datasets(run, generation.datasets)
        if generation.policy is not None:
            self._register(run, generation.policy)
        self._client.log_batch(
            run.info.run_id,
            metrics=[
                Metric(name, value, generation.ended_ms, generation.index)
                for name, value in {
                    **generation.metrics,
                    **self._calls.metrics(generation.index),
                }.items()
            ],
            params=[Param(name, value) for name, value in generation.params.items()],
        )

    def _known_traces(self) -> dict[str, tuple[str, str]]:
        """Scope -> calls in its trace, and the MLflow run that it belongs to."""
        known: dict[str, tuple[str, str]] = {}
        token = None
        while True:
            page = self._client.search_traces(
                locations=[self._experiment],
                filter_string=f"tags.`sia.run_id` = '{self._view.info.run_id}'",
                max_results=500,
                include_spans=False,
                page_token=token,
            )
            for trace in page:
                tags, metadata = trace.info.tags, trace.info.trace_metadata
                known[tags["sia.scope"]] = tags["sia.calls"], metadata[SOURCE_RUN]
            token = page.token
            if not token:
                return known

    def _write_traces(self, generation: int) -> None:
        for one in self._calls.scopes():
            if one.generation == generation:
                self._write_trace(one, self._run_ids[generation])

    def _write_trace(self, one: ScopeCalls, run_id: str) -> None:
        """Writes a trace unless MLflow holds it with all its calls."""
        state = str(one.calls), run_id
        if self._traced.get(one.scope) == state:
            return
        view = self._calls.trace(one)
        self._tracing.log_spans(self._experiment, [Span.from_dict(span) for span in view.spans])
        # The tag that counts the calls comes last: without it the spans are written again.
        self._tracing.start_trace(
            TraceInfo(
                trace_id=view.trace_id,
                trace_location=TraceLocation.from_experiment_id(self._experiment),
                request_time=view.started_ms,
                execution_duration=view.duration_ms,
                state=TraceState.ERROR if view.failed else TraceState.OK,
                request_preview=view.prompt,
                response_preview=view.reply,
                trace_metadata={**view.metadata, SOURCE_RUN: run_id},
                tags={**view.tags, "mlflow.traceName": one.scope},
            )
        )
        self._traced[one.scope] = state

    def _write_left_calls(self) -> None:
        """Calls of no closed generation, and those that were recorded after theirs was written."""
        self._calls.read()
        scopes = self._calls.scopes()
        if not scopes:
            return
        for one in scopes:
            run_id = self._run_ids.get(-1 if one.generation is None else one.generation)
            self._write_trace(one, run_id or self._parent_id)
        paid = {name: v for name, v in self._calls.totals().items() if self._paid.get(name) != v}
        if paid:
            step = max((one.generation for one in scopes if one.generation is not None), default=0)
            moment = self._view.ended_ms
            metrics = [Metric(name, value, moment, step) for name, value in paid.items()]
            self._client.log_batch(self._parent_id, metrics=metrics)
            self._paid |= paid

    def _write_datasets(self, run: Run, datasets: tuple[DatasetView, ...]) -> None:
        inputs = [
            DatasetInput(
                Dataset(
                    name=one.name,
                    digest=one.digest,
                    source_type="local",
                    source=one.name,
                    profile=json.dumps({"n_items": one.n_items}) if one.n_items else None,
                ),
                [InputTag("mlflow.data.context", one.context)],
            )
            for one in datasets
        ]
        # Another run of the experiment may enter the same dataset between MLflow's look and its
        # insert.
        _again(partial(self._client.log_inputs, run.info.run_id, inputs))

    def _register(self, run: Run, policy: PolicyView) -> None:
        """Enters a policy into the model registry, unless it is there."""
        run_id = str(run.info.run_id)
        self._write_files(run, {f"policy/{name}": data for name, data in policy.files.items()})
        known = self._client.search_model_versions(f"run_id = '{run_id}'")
        if any(one.tags.get("sia.candidate") == policy.candidate for one in known):
            return
        if not self._client.search_registered_models(f"name = '{policy.model}'"):
            with suppress(MlflowException):  # another run was first; if not, the next call fails
                self._client.create_registered_model(policy.model)
        self._client.create_model_version(
            policy.model,
            source=f"{run.info.artifact_uri}/policy",
            run_id=run_id,
            tags=policy.tags,
            description=policy.description,
            await_creation_for=0,
        )

    def _write_files(self, run: Run, files: dict[str, bytes]) -> None:
        folder = _local_path(run.info.artifact_uri)
        if folder is not None:
            _write_all(folder, files)
        elif files:
            with tempfile.TemporaryDirectory() as temporary:
                _write_all(Path(temporary), files)
                self._client.log_artifacts(run.info.run_id, temporary)

    def _set_status(self, status: str) -> None:
        info = self._parent.info
        if status == "RUNNING":
            if info.status != status:
                self._client.update_run(self._parent_id, status)
                self._parent = self._client.get_run(self._parent_id)
        elif (info.status, info.end_time) != (status, self._view.ended_ms):
            self._client.set_terminated(self._parent_id, status, self._view.ended_ms)


@contextmanager
def opened(run: Path, location: Location) -> Iterator[Mirror]:
    """The mirror of `run`, for this process alone.

    Raises:
        RunDirectoryError: `run` holds no run.
        TrackingError: The database cannot be used, or another process mirrors the same run.
    """
    view = RunView(run)
    with _lock(view.path), connected(location):
        yield Mirror(view, location)


@contextmanager
def reported(location: Location) -> Iterator[None]:
    """Turns what a user can mend into one line.

    Raises:
        TrackingError: The database or the server failed.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise TrackingError(f"Cannot use {location}: {first_line(error)}") from error


@contextmanager
def connected(location: Location) -> Iterator[None]:
    """A database that can be used; its connections are closed at the end."""
    engines: set[Engine] = set()

    def keep(connection: Any) -> None:
        engines.add(connection.engine)

    event.listen(Engine, "engine_connect", keep)
    try:
        if location.database is not None:
            create_database(location)
        yield
    finally:
        event.remove(Engine, "engine_connect", keep)
        # The last connection to close moves SQLite's write-ahead log into the database.
        for engine in engines:
            engine.dispose()


def count_experiments(location: Location) -> int:
    """How many experiments MLflow finds; 1,000 stand for more. A question that any fault breaks."""
    return len(MlflowClient(tracking_uri=location.uri).search_experiments(max_results=1000))


def pages(location: Location) -> dict[str, str]:
    """Experiment -> path of the page that shows its runs, for all of ours; newest use first."""
    found = MlflowClient(tracking_uri=location.uri).search_experiments(
        order_by=["last_update_time DESC"]
    )
    return {
        one.name: experiment.page_path(one.experiment_id)
        for one in found
        if experiment.VIEW_TAG in one.tags
    }


def create_database(location: Location) -> None:
    """Makes the SQLite database of `location` unless it is there.

    It is made aside and moved into place: MLflow's own creation, interrupted or done by two
    processes at once, leaves a file that no later run can use.

    Raises:
        TrackingError: The file is there and is not an MLflow database.
    """
    path = location.database
    assert path is not None
    if not _is_missing(path):
        _check(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=INIT_TIMEOUT_S):
        if _is_missing(path):
            for left in path.parent.glob(f"{path.name}.new*"):
                left.unlink()
            new = path.with_name(f"{path.name}.new")
            with _unsafe_but_fast():
                uri, root = f"sqlite:///{new}", f"{location.artifacts}/default"
                store = SqlAlchemyStore(uri, root)  # type: ignore[no-untyped-call]  # MLflow's lack
            store.engine.dispose()
            with sqlite3.connect(new) as database:
                # One commit costs 2 ms with a write-ahead log and 24 ms without.
                database.execute("PRAGMA journal_mode=WAL")
            database.close()
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)


def _check(path: Path) -> None:
    """Asks SQLite itself: MLflow retries for minutes on a file that is no database."""
    try:
        database = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT version_num FROM alembic_version").fetchone()
        finally:
            database.close()
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            return
        raise TrackingError(
            f"{path} cannot be used as an MLflow database: {error}. "
            "Move it away, then: python -m sia.tracking init"
        ) from error


def _is_missing(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


@event.listens_for(Engine, "connect")
def _fewer_flushes(connection: Any, _: Any) -> None:
    """A power cut may cost the last commits, never the database; `sync` writes them again."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=NORMAL")


@contextmanager
def _unsafe_but_fast() -> Iterator[None]:
    def never_flush(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", never_flush)
    try:
        yield
    finally:
        event.remove(Engine, "connect", never_flush)


def _experiment(client: MlflowClient, name: str, location: Location) -> str:
    """Id of the experiment; created where it is missing, by whichever process is first.

    Its note, its view and its kind are written unless somebody has written others.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        folder = name.replace("/", "-")
        root = location.artifacts and f"{location.artifacts.rstrip('/')}/{folder}"
        try:
            client.create_experiment(name, artifact_location=root)
        except MlflowException:
            if client.get_experiment_by_name(name) is None:
                raise
        found = client.get_experiment_by_name(name)
        assert found is not None
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"The experiment {name!r} was deleted in MLflow. Bring it back: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    identity = str(found.experiment_id)
    for key, value in experiment.tags(name.partition("/")[2], found.creation_time or 0).items():
        known = found.tags.get(key, "")
        ours = key == experiment.VIEW_TAG or known.endswith("_inferred")  # by MLflow's page
        if not known or (ours and known != value):
            _again(partial(client.set_experiment_tag, identity, key, value))
    return identity


def _again(call: Callable[[], Any]) -> None:
    """Calls, and once more where another process wrote the same row at the same time."""
    try:
        call()
    except MlflowException:
        call()


def _tags(tags: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if value}


def _local_path(uri: str) -> Path | None:
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(uri) if uri.startswith("/") else None


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    """One mirror of a run at a time; the lock is on `run.json`, so that no file is added."""
    try:
        file = os.open(run / RUN_FILE, os.O_RDWR | os.O_CLOEXEC)  # NFS locks need write access
    except OSError:
        file = os.open(run / RUN_FILE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + MIRROR_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"Another process mirrors {run}. When it has ended: "
                        f"python -m sia.tracking sync {run}"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(file)
