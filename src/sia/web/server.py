"""A server that listens, until it is interrupted or nobody has looked for a while."""

import socket
import threading
import time
from collections.abc import Callable, Collection

import uvicorn

from sia.pages import Runs
from sia.web.app import make_app
from sia.web.guard import Guard

LOOK_S = 1.0


def serve(
    runs: Runs,
    listener: socket.socket,
    *,
    names: Collection[str],
    token: str | None,
    idle_s: float | None,
    busy: Callable[[], bool],
) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        runs: What is shown.
        listener: Bound and listening.
        names: See `Guard`.
        token: See `Guard`.
        idle_s: Ends by itself when no page was open for so long; None: never.
        busy: Whether it has to stay all the same.
    """
    guard = Guard(make_app(runs), names=names, token=token)
    server = uvicorn.Server(
        uvicorn.Config(
            guard,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,  # an open page would keep it for ever
        )
    )
    if idle_s is not None:
        threading.Thread(target=_watch, args=(server, guard, idle_s, busy), daemon=True).start()
    server.run(sockets=[listener])


def _watch(server: uvicorn.Server, guard: Guard, idle_s: float, busy: Callable[[], bool]) -> None:
    while guard.idle_s() < idle_s or busy():
        time.sleep(min(LOOK_S, idle_s))
    server.should_exit = True
