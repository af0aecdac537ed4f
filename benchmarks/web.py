"""How long the live page takes for its first view, and what it needs, of a large run and many runs.

    python benchmarks/web.py

Each row starts a server of its own, whose first page is the view: nothing is in its memory yet.
Times are seen by a client on the same machine, from request to last byte; memory is the peak of the
server's process. Machines are noisy: compare within one table.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from made_runs import make_run


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--trajectories", type=int, default=50, help="of each generation")
    parser.add_argument("--items", type=int, default=800, help="of the dev split")
    parser.add_argument("--runs", type=int, default=1000)
    options = parser.parse_args(argv)
    print(
        "| first view of | seconds | again | peak MiB | page KiB |\n| --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory(prefix="sia-web-") as folder:
        large, many = Path(folder, "large"), Path(folder, "many")
        make_run(
            large / "run",
            generations=options.generations,
            trajectories=options.trajectories,
            items=options.items,
        )
        total = options.generations * options.trajectories
        shape = f"{options.generations} generations, {total:,} trajectories"
        _row(f"a run: {shape}", large, "/run/run")
        last = f"/candidate/g{options.generations - 1:03}-c0/run"
        _row("its last candidate", large, last)
        _row("a search in its trajectories", large, f"{last}?view=trajectories&text=number")
        many.mkdir()
        first = make_run(many / "toy-0000", generations=2, items=options.items)
        for number in range(1, options.runs):
            shutil.copytree(first, many / f"toy-{number:04}")
        _row(f"a folder of {options.runs:,} runs", many, "/")
        _row("the same, best first", many, "/?order=best&text=toy-09")


def _row(name: str, folder: Path, path: str) -> None:
    command = [sys.executable, "-m", "sia.web", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"(http://\S+)/ ", process.stdout.readline())
        assert found is not None
        # The server is up, and has read no run.
        _seconds(f"{found[1]}/assets/icon.svg")
        first, size = _seconds(found[1] + path)
        again, _ = _seconds(found[1] + path)
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+)", status)
        assert peak is not None
        peak_mib = int(peak[1]) / 1024
        print(f"| {name} | {first:.2f} | {again:.2f} | {peak_mib:.0f} | {size / 1024:.0f} |")
    finally:
        process.terminate()
        process.wait()


def _seconds(address: str) -> tuple[float, int]:
    """Of one answer: time to its last byte, and bytes."""
    begun = time.perf_counter()
    with urllib.request.urlopen(address, timeout=60) as answer:
        size = len(answer.read())
    return time.perf_counter() - begun, size


if __name__ == "__main__":
    main()
