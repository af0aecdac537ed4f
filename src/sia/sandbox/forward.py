"""Gives a sandbox without a network one loopback port: `forward.py PORT SOCKET COMMAND...`.

Listens, hands every connection on to a Unix socket from a process of its own, and becomes the
command. It runs inside the sandbox with whatever interpreter is there: the standard library alone.
"""

import contextlib
import os
import selectors
import socket
import sys

CHUNK = 2**16
HIGH_WATER = 2**20  # bytes waiting for one side before the other is not read any more


class Side:
    """One end of a connection, with what it still has to be sent."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.other: Side
        self.waiting = bytearray()
        self.ended = False  # nothing more will come from this side
        end.setblocking(False)


def serve(listener: socket.socket, target: str) -> None:
    """Forwards until the process is killed."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                accept(listener, target, selector)
            elif key.data.end.fileno() >= 0:  # else closed with its other side a moment ago
                turn(key.data, selector)


def accept(listener: socket.socket, target: str, selector: selectors.BaseSelector) -> None:
    """Takes one connection; it is dropped where the other end cannot be reached."""
    near = listener.accept()[0]
    # Head and body come in pieces; without this the second waits for the receipt of the first.
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    far = socket.socket(socket.AF_UNIX)
    try:
        far.connect(target)
    except OSError:
        near.close()
        far.close()
        return
    one, two = Side(near), Side(far)
    one.other, two.other = two, one
    for side in (one, two):
        selector.register(side.end, selectors.EVENT_READ, side)


def turn(side: Side, selector: selectors.BaseSelector) -> None:
    """Reads what has come from one side, sends what waits for it, and says what to watch for."""
    other = side.other
    try:
        if side.waiting:
            del side.waiting[: side.end.send(side.waiting)]
        elif not side.ended and len(other.waiting) < HIGH_WATER:
            chunk = side.end.recv(CHUNK)
            other.waiting += chunk
            side.ended = not chunk
    except BlockingIOError:
        pass
    except OSError:
        side.ended = other.ended = True
        side.waiting.clear()
        other.waiting.clear()
    for one in (side, other):
        if one.other.ended and not one.waiting:
            with contextlib.suppress(OSError):  # it may be gone
                one.end.shutdown(socket.SHUT_WR)
    if side.ended and other.ended and not side.waiting and not other.waiting:
        for one in (side, other):
            watch(one, 0, selector)
            one.end.close()
        return
    for one in (side, other):
        events = selectors.EVENT_WRITE if one.waiting else 0
        if not one.ended and not one.waiting and len(one.other.waiting) < HIGH_WATER:
            events |= selectors.EVENT_READ
        watch(one, events, selector)


def watch(side: Side, events: int, selector: selectors.BaseSelector) -> None:
    """Waits for `events` of one side; for none, the side is left alone."""
    known = side.end in selector.get_map()
    if events and known:
        selector.modify(side.end, events, side)
    elif events:
        selector.register(side.end, events, side)
    elif known:
        selector.unregister(side.end)


def main() -> None:
    """Listens before the command begins, so that the command never has to wait or try again."""
    port, target, *command = sys.argv[1:]
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(port)))
    listener.listen(512)
    if os.fork() == 0:
        # Twice, so that the command has no child that it does not know.
        if os.fork() == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            serve(listener, target)
        os._exit(0)
    os.wait()
    listener.close()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
