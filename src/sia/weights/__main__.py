"""`python -m sia.weights JOB.json | fetch NAME | serve --model ...`: training, and local models.

JOB.json   makes one update of the weights, in this process; see sia.weights.update.Job
fetch      brings a model onto this machine, checked by hash
serve      answers OpenAI chat completions and completions, log-probabilities included
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from sia.errors import SiaError, WeightsError
from sia.records import to_json


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith(".json"):
        argv = ["update", *argv]
    parser = argparse.ArgumentParser(
        prog="python -m sia.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    update = commands.add_parser("update", help="make one update; 'update' may be left out")
    update.add_argument("job", type=Path, help="a file that ends in .json")
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
        if command == "update":
            _update(**args)
        elif command == "fetch":
            from sia.weights import models

            print(f"{args['model']}: {models.fetch(args['model'])}")
        else:
            from sia.weights.serve import serve as serve_model

            serve_model(**args)
    except SiaError as error:
        print(f"sia: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _update(job: Path) -> None:
    from sia.weights.update import PACKAGES, read_job, update

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise WeightsError(
            f"Weights are trained with {', '.join(missing)}, not installed here. Install the "
            "extra: pip install -e '.[train]'"
        )
    print(to_json(update(read_job(job)).report).decode())


if __name__ == "__main__":
    raise SystemExit(main())
