"""`python -m sia.weights fetch NAME | serve --model NAME_OR_PATH`: local models.

fetch   brings a model onto this machine, checked by hash
serve   answers OpenAI chat completions and completions, log-probabilities included
"""

import argparse
import sys
from pathlib import Path

from sia.errors import SiaError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m sia.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="bring a model onto this machine")
    fetch.add_argument("model", help="smollm2, or an id of the model hub")
    serve = commands.add_parser("serve", help="serve a model, and an adapter on it")
    serve.add_argument("--model", required=True, help="a fetched one, a .gguf file, or a folder")
    serve.add_argument("--adapter", type=Path, help="folder of a PEFT adapter")
    where = serve.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="on the loopback interface; 0: any")
    where.add_argument("--uds", type=Path, help="Unix socket; its name ends in .sock")
    serve.add_argument("--slots", type=int, default=1, help="answers at once (GGUF only)")
    serve.add_argument("--threads", type=int, help="default: as many as there are cores")
    serve.add_argument("--context", type=int, default=8192, help="tokens (GGUF only)")
    serve.add_argument("--until-eof", action="store_true", help="end with the standard input")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        if command == "fetch":
            from sia.weights import models

            print(f"{args['model']}: {models.fetch(args['model'])}")
        else:
            from sia.weights.serve import serve as serve_model

            serve_model(**args)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
