"""The loopback port of a sandbox, with real sockets at both ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sia.sandbox.launch import FORWARD

WAIT_S = 10.0


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[[], socket.socket]]:
    """Connections to a server that echoes one line and closes first, through the forwarder."""
    path = tmp_path / "server.sock"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        # The command ends with the test; the forwarder, in its process group, is ended with it.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(FORWARD), str(port), str(path), "sleep", "60"],
            start_new_session=True,
        )
        try:
            yield lambda: reach(port)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def echo(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the test is over
            return
        with connection:
            connection.sendall(connection.makefile("rb").readline())


def reach(port: int) -> socket.socket:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        except ConnectionRefusedError:  # it is not listening yet
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def test_a_connection_that_the_server_closes_first_harms_no_later_one(
    connect: Callable[[], socket.socket],
) -> None:
    for number in range(3):
        with connect() as client:
            client.sendall(b"line %d\n" % number)
            assert client.makefile("rb").read() == b"line %d\n" % number
        time.sleep(0.05)  # the forwarder sees the end of one before the next begins
