"""Where the page is: the socket it listens on, the names it answers to, the link to print."""

import errno
import ipaddress
import socket

from sia.errors import ConfigError

HOST, PORT = "127.0.0.1", 8321
TRIES = 20  # ports after the usual one, where it is taken and none was asked for


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket.

    Args:
        host: Name or address.
        port: None: the usual one, or the next that is free.

    Raises:
        ConfigError: It cannot be listened on.
    """
    ports = range(PORT, PORT + TRIES) if port is None else (port,)
    for number in ports:
        try:
            family, kind, _, _, place = socket.getaddrinfo(
                host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(place)
                listener.listen()
            except BaseException:
                listener.close()
                raise
            return listener
        except OSError as error:
            if error.errno != errno.EADDRINUSE or number == ports[-1]:
                raise ConfigError(
                    f"Cannot listen on {host!r}, port {number}: {error.strerror or error}. "
                    "Choose another one: python -m sia.web --port 8400"
                ) from error
    raise AssertionError  # the last port has raised


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_everywhere(host: str) -> bool:
    """Whether it stands for all addresses of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""


def link(name: str, port: int, token: str | None) -> str:
    """The address to open."""
    shown = f"[{name}]" if ":" in name else name
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
