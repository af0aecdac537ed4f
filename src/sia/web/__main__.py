"""`python -m sia.web [RUNS_FOLDER]`: a page over all runs of a folder, live while they go on."""

import argparse
import os
import socket
import sys
from pathlib import Path

from sia.errors import ConfigError, SiaError
from sia.web.address import HOST, PORT, is_everywhere, is_loopback, link, listen

TOKEN_VARIABLE = "SIA_WEB_TOKEN"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        return _serve(options)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sia.web", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="RUNS_FOLDER")
    parser.add_argument("--port", type=int, help=f"default: {PORT}, or the next that is free")
    parser.add_argument(
        "--host", default=HOST, help="address to listen on; any but loopback needs a token"
    )
    parser.add_argument(
        "--name", action="append", default=[], help="a further host name to answer to; repeatable"
    )
    parser.add_argument(
        "--token",
        help=f"ask for this token (default: ${TOKEN_VARIABLE}; a new one where one is needed)",
    )
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)  # a socket that a run has opened
    parser.add_argument("--idle-s", type=float, help="end when nobody has looked for so long")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # idle-s counts once nobody works on it
    return parser


def _serve(options: argparse.Namespace) -> int:
    from sia.pages import Runs
    from sia.pages.run import is_locked

    try:
        from sia.web.guard import LOOPBACK, new_token
        from sia.web.server import serve
    except ImportError as error:
        raise ConfigError(
            f"The page needs the extra web ({error}). Install it: pip install 'sia-framework[web]'"
        ) from error
    runs = Runs(options.folder)
    names = {*LOOPBACK, *options.name} if is_loopback(options.host) else set(options.name)
    token = options.token or os.environ.get(TOKEN_VARIABLE)
    if not is_loopback(options.host):
        token = token or new_token()
        if not is_everywhere(options.host):
            names.add(options.host)
        elif not names:
            raise ConfigError(
                f"--host {options.host} listens on all addresses: say by which name people come, "
                f"for example --host {options.host} --name {socket.gethostname()}"
            )
    listener = listen(options.host, options.port) if options.fd is None else _given(options.fd)
    shown = options.host if options.host in names else sorted(names)[0]
    port = listener.getsockname()[1]
    print(
        f"{runs.folder.root} is shown at {link(shown, port, token)}  (Ctrl-C ends it)", flush=True
    )
    serve(
        runs,
        listener,
        names=names,
        token=token,
        idle_s=options.idle_s,
        busy=lambda: options.run is not None and is_locked(runs.folder, options.run),
    )
    return 0


def _given(fd: int) -> socket.socket:
    return socket.socket(fileno=fd)


if __name__ == "__main__":
    sys.exit(main())
