"""One update inside the sandbox: `inside.py --dataset_dir PUBLIC --working_dir WORK`.

Reads `job.json` beside itself, leaves `policy/` in the working folder, and prints as its last line
what was done, in numbers that do not depend on the machine's speed.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from sia.errors import SiaError
from sia.weights.crossfit import cross_fit
from sia.weights.update import Report, parse_job, read_record, update

PUBLIC = "public/"  # begins names of files in task.yaml
KEPT = ("steps", "reward_before", "reward_after", "kl", "entropy", "silent_share")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    args = parser.parse_args()
    here = Path(__file__).parent
    plan = json.loads((here / "job.json").read_bytes())
    folds = plan["policy"].pop("folds", None)
    out = args.working_dir / "policy"
    job = {
        **plan,
        "policy": {
            name: _located(value, args.dataset_dir) for name, value in plan["policy"].items()
        },
        "task": str(here / "train.py"),
        "public": str(args.dataset_dir),
        "out": str(out),
    }
    try:
        if folds:
            cross_fit(parse_job(job), folds=folds)
            reports = [read_record(out / f"fold{k}").report for k in range(folds)]
        else:
            reports = [update(parse_job(job)).report]
    except SiaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(_mean(reports)))
    return 0


def _located(value: Any, public: Path) -> Any:
    if isinstance(value, str) and value.startswith(PUBLIC):
        return str(public / value.removeprefix(PUBLIC))
    return value


def _mean(reports: list[Report]) -> dict[str, float]:
    """Of the folds, where there are some; what was not measured is left out."""
    found = {}
    for name in KEPT:
        values = [value for report in reports if (value := getattr(report, name)) is not None]
        if values:
            found[name] = round(fmean(values), 6)
    return found


if __name__ == "__main__":
    sys.exit(main())
