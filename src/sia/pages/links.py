"""Where the links of a page lead: addresses of the server, or places in a file of its own."""

from typing import Protocol
from urllib.parse import quote, urlencode


class Links(Protocol):
    """Gives addresses to templates; an empty text means that there is nothing to lead to."""

    def runs(self, **query: str) -> str:
        """The list of runs."""
        ...

    def run(self, key: str) -> str:
        """A run."""
        ...

    def candidate(self, key: str, candidate: str, view: str = "", **query: str | int) -> str:
        """A view of a candidate."""
        ...

    def compare(self, *keys: str) -> str:
        """A comparison of runs."""
        ...


class ServerLinks:
    """The addresses of `python -m sia.web`. The run comes last: its name may hold anything."""

    def runs(self, **query: str) -> str:
        """The list of runs."""
        return _address("/", **query)

    def run(self, key: str) -> str:
        """A run."""
        return f"/run/{quote(key)}"

    def candidate(self, key: str, candidate: str, view: str = "", **query: str | int) -> str:
        """A view of a candidate."""
        chosen = {"view": view} if view else {}
        return _address(f"/candidate/{quote(candidate, safe='')}/{quote(key)}", **chosen, **query)

    def compare(self, *keys: str) -> str:
        """A comparison of runs."""
        return f"/compare?{urlencode([('run', key) for key in keys])}"


def _address(path: str, **query: str | int) -> str:
    given = {name: value for name, value in query.items() if value not in ("", None)}
    return f"{path}?{urlencode(given)}" if given else path
