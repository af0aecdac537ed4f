"""Where the mirror is: the tracking URI and the root of the artifacts. Imports no MLflow."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sia.errors import SiaError

URI_VARIABLE = "MLFLOW_TRACKING_URI"
DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
_SQLITE = "sqlite:///"


class TrackingError(SiaError):
    """The mirror cannot be opened or written. The run directory is complete without it."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where to write.

    Attributes:
        uri: An absolute SQLite URI, another database, or a server.
        artifacts: Root of the artifacts of new experiments; None leaves it to the server.
        database: The file of a SQLite URI; None for all others.
    """

    uri: str
    artifacts: str | None
    database: Path | None

    def __str__(self) -> str:
        """The URI without a password."""
        return re.sub(r"//[^/@]*@", "//***@", self.uri)


def locate(
    *, uri: str | None = None, option: str | None = None, artifacts: str | None = None
) -> Location:
    """The first of `uri`, `MLFLOW_TRACKING_URI`, `option` and `mlflow.db` in this folder.

    Args:
        uri: Given on the command line, for this one command.
        option: Given in the configuration.
        artifacts: Root of the artifacts: a folder or a URI. None means `mlartifacts` beside a
            SQLite database, and the server's own choice for a server.

    Raises:
        TrackingError: A SQLite URI without a file.
    """
    chosen = uri or os.environ.get(URI_VARIABLE) or option or f"{_SQLITE}{DATABASE}"
    database = None
    if chosen.startswith("sqlite:"):
        name = chosen.removeprefix(_SQLITE)
        if name in ("", ":memory:") or name == chosen:
            raise TrackingError(
                f"{chosen!r} names no file. Write {_SQLITE}/absolute/path/{DATABASE}"
            )
        database = Path(name).absolute()
        chosen = f"{_SQLITE}{database}"
        artifacts = artifacts or str(database.parent / ARTIFACTS)
    elif not chosen.startswith(("http:", "https:", "databricks")):
        artifacts = artifacts or ARTIFACTS
    if artifacts is not None and "://" not in artifacts:
        artifacts = Path(artifacts).absolute().as_uri()
    return Location(uri=chosen, artifacts=artifacts, database=database)


def child_environment(location: Location) -> dict[str, str]:
    """This process's environment for a process that talks to MLflow at `location`.

    The URI goes by environment, not by argument: it may hold a password. Variables that would
    redirect runs are left out.
    """
    redirecting = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME")
    kept = {name: value for name, value in os.environ.items() if name not in redirecting}
    return {**kept, URI_VARIABLE: location.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}


def first_line(error: Exception) -> str:
    """Kind and message of an error on one line of readable length."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
