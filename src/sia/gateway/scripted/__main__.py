"""`python -m sia.gateway.scripted SCRIPT [--port N]`: serves a script until it is interrupted."""

import argparse
import signal
import sys
from pathlib import Path

from sia.errors import SiaError
from sia.gateway.scripted import read_rules, serving


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sia.gateway.scripted", description=__doc__)
    parser.add_argument("script", type=Path, help="a YAML list of rules")
    parser.add_argument("--port", type=int, default=8399)
    args = parser.parse_args(argv)
    endings = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, endings)  # before the server's thread begins
    try:
        with serving(read_rules(args.script), port=args.port) as scripted:
            print(f"listening on {scripted.url}", flush=True)
            signal.sigwait(endings)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"sia: port {args.port} cannot be used: {error.strerror}. Another: --port 0",
              file=sys.stderr)  # fmt: skip
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
