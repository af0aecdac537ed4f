"""What a generation costs when the target costs nothing, beside the public sia-agent package.

`meta=scripted` on the toy task, whose target writes its submission and exits: everything that is
left is ours. The upstream package runs in the same session on the same machine (see upstream_sia.py
for what is and is not included there). Times are of noisy machines: compare within one table.

    python benchmarks/orchestration.py                    ours, without upstream
    python benchmarks/orchestration.py --upstream-venv D  and upstream, in its own environment D
    python benchmarks/orchestration.py --generations 1000 how flat it stays
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

DEADLINE_S = 1_800
VARIANTS = (
    ("bwrap", "none"),
    ("process", "none"),
    ("bwrap", "mlflow"),
    ("process", "mlflow"),
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One variant: milliseconds per generation from the journal's clock, and of the whole process.

    Attributes:
        start_ms: From process start to the beginning of generation 0.
        total_ms: Whole process per generation, start-up and the tracker's end included.
        first_ms: Median over generations 1 to 10.
        last_ms: Median over the last hundred generations.
    """

    sandbox: str
    tracking: str
    generations: int
    median_ms: float
    first_ms: float
    last_ms: float
    start_ms: float
    total_ms: float


def measure(sandbox: str, tracking: str, generations: int) -> Timing:
    """Runs one variant in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="sia-bench-") as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, "-m", "sia", "task=toy", "meta=scripted", f"sandbox={sandbox}",
            f"tracking={tracking}", f"generations={generations}", f"hydra.run.dir={run}",
        ]  # fmt: skip
        started, clock = time.time(), time.monotonic()
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        total = time.monotonic() - clock
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        made = (run / "journal.jsonl").stat()
    ends = [line["elapsed_s"] for line in lines if line["key"].endswith("/generation")]
    steps = [1e3 * (b - a) for a, b in itertools.pairwise(ends)]
    # The journal is written last when the last generation closes: its age then is known.
    start = made.st_mtime - started - lines[-1]["elapsed_s"]
    return Timing(
        sandbox=sandbox,
        tracking=tracking,
        generations=generations,
        median_ms=statistics.median(steps),
        first_ms=statistics.median(steps[:10]),
        last_ms=statistics.median(steps[-100:]),
        start_ms=1e3 * start,
        total_ms=1e3 * total / generations,
    )


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument(
        "--upstream-venv", type=Path, help="environment of sia-agent, made if absent"
    )
    args = parser.parse_args()
    measure("process", "none", 2)  # byte-code and the toy data
    print(
        "| system | sandbox | MLflow | generations | median ms | 1-10 | last 100 | start | total |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for sandbox, tracking in VARIANTS:
        found = measure(sandbox, tracking, args.generations)
        print(
            f"| ours | {sandbox} | {'on' if tracking == 'mlflow' else 'off'} | {found.generations} "
            f"| {found.median_ms:.0f} | {found.first_ms:.0f} | {found.last_ms:.0f} "
            f"| {found.start_ms:.0f} | {found.total_ms:.0f} |",
            flush=True,
        )
    if args.upstream_venv:
        from upstream_sia import measure as measure_upstream

        for summaries in (False, True):
            other = measure_upstream(args.upstream_venv, (2, 10), 3, summaries=summaries)
            print(
                f"| sia-agent {other.version}, summaries {'on' if summaries else 'off'} | none | - "
                f"| 10 | {other.per_generation_ms:.0f} | | | {other.start_ms:.0f} | |",
                flush=True,
            )


if __name__ == "__main__":
    main()
