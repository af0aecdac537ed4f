"""What the Triton harness of `trimul` is worth on a GPU: its knobs, one after the other.

The knobs of `space.yaml` are tried in their order and the best value of each is kept, on the seven
ranked cases in this process: inputs drawn as the task draws them, every setting compared with the
reference, times by events on the card. Then the best setting goes through the task's own protocol,
which trusts nothing: a sandbox, inputs that are new in every call. That takes minutes for the
largest cases, whose gigabytes are compared on the CPU.

    python benchmarks/trimul_gpu.py                    reports/trimul_gpu.md; needs a GPU
    python benchmarks/trimul_gpu.py --cases 2 --protocol 1 --out /tmp/try
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import yaml

from sia.meta.knobs import Knobs, load_space, read_knobs, write_knobs
from sia.sandbox.auto import auto
from sia.sandbox.process import Process
from sia.tasks.task import load_module

ROOT = Path(__file__).resolve().parents[1]
TASK = ROOT / "tasks" / "trimul"
HARNESS = TASK / "harness_triton"
WARM_UP_MS, MEASURED_MS = 10, 60
ROUNDS = 3

arena, guests, inputs, prepare, reference = (
    load_module(TASK / f"{name}.py")
    for name in ("arena", "guest", "inputs", "prepare", "reference")
)
entry = load_module(HARNESS / "target_agent.py")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting of the harness.

    Attributes:
        knobs: All values.
        us: Median of each case, in their order; empty where it does not run or is wrong.
        error: The largest of all cases, in tolerances.
        problem: Why it does not count.
    """

    change: str
    knobs: Knobs = field(repr=False)
    us: tuple[float, ...] = ()
    error: float = math.nan
    problem: str = ""

    @property
    def geomean_us(self) -> float:
        """Of all cases; infinite for a setting that does not count."""
        return geomean(self.us) if self.us else math.inf


def geomean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def drawn(case: Mapping[str, Any], rng: np.random.Generator) -> Any:
    """The inputs of a call, on the card."""
    arrays = inputs.views(case, bytearray(inputs.n_bytes(case)))
    inputs.fill(case, arrays, rng)
    tensors = {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}
    x, mask = tensors.pop("x"), tensors.pop("mask")
    return x, mask, tensors, {"dim": case["dim"], "hidden_dim": inputs.HIDDEN}


def median_us(kernel: Any, data: Any) -> float:
    """Of one call; the cache of the card is emptied between calls."""
    return 1e3 * float(
        triton.testing.do_bench(
            lambda: kernel(data), warmup=WARM_UP_MS, rep=MEASURED_MS, return_mode="median"
        )
    )


def tolerances(found: Any, expected: Any) -> float:
    """The largest error; infinite where a value is not a number."""
    allowed = reference.ATOL + reference.RTOL * expected.abs()
    worst = float(((found - expected).abs() / allowed).max())
    return worst if worst == worst else math.inf


def rendered(knobs: Knobs, folder: Path) -> Path:
    """The submission with these values of the knobs; a file of its own, since Triton reads it."""
    shutil.copyfile(HARNESS / "harness.yaml", folder / "harness.yaml")
    write_knobs(folder, knobs)
    settings = yaml.safe_load((folder / "harness.yaml").read_text(encoding="utf-8"))
    path = folder / f"kernel_{time.monotonic_ns()}.py"
    path.write_text(entry.rendered(settings), encoding="utf-8")
    return path


def tried(change: str, knobs: Knobs, calls: Sequence[Any], folder: Path) -> Tried:
    """One setting on all cases."""
    kernel = load_module(rendered(knobs, folder)).custom_kernel
    times, worst = [], 0.0
    try:
        for data in calls:
            found = kernel(data)
            worst = max(worst, tolerances(found, reference.reference(data)))
            del found
            if worst > 1:
                return Tried(change=change, knobs=knobs, error=worst, problem="wrong")
            times.append(median_us(kernel, data))
    except triton.runtime.errors.OutOfResources as error:
        return Tried(change=change, knobs=knobs, problem=str(error).splitlines()[0])
    return Tried(change=change, knobs=knobs, us=tuple(times), error=worst)


def search(calls: Sequence[Any], folder: Path) -> list[Tried]:
    """All that was tried."""
    space = load_space(HARNESS)
    found = [tried("as it comes", read_knobs(HARNESS, space), calls, folder)]
    print(found[0], flush=True)
    for name, knob in space.knobs.items():
        before = best_of(found).knobs
        for value in knob.values:
            if value != before[name] and knob.active(before):
                change = f"{name}={str(value).lower()}"
                found.append(tried(change, {**before, name: value}, calls, folder))
                print(found[-1], flush=True)
    return found


def best_of(found: Sequence[Tried]) -> Tried:
    """The fastest; of equals the first."""
    return min(found, key=lambda one: one.geomean_us)


def judged(knobs: Knobs, cases: Sequence[Any], folder: Path, sandbox: Any) -> tuple[list[Any], str]:
    """One setting by the rules of the task, and the name of the card."""
    path = rendered(knobs, folder).replace(folder / "submission.py")
    ground = arena.Arena(
        guests=guests, inputs=inputs, sandbox=sandbox, rng=np.random.default_rng(), share=1.0
    )
    timed, card = ground.time_on_gpu(path, cases, rounds=ROUNDS)
    return timed, card


def main() -> None:
    """Tries everything and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    n = len(prepare.RANKED)
    parser.add_argument("--cases", type=int, default=n, help="only the first ones")
    parser.add_argument("--protocol", type=int, default=n, help="only so many by the protocol")
    parser.add_argument("--sandbox", choices=("auto", "process"), default="auto")
    parser.add_argument("--out", type=Path, default=ROOT, help="reports/ lies below it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    torch.backends.cuda.matmul.allow_tf32 = False
    verify = load_module(TASK / "verify.py")
    cases = prepare.ranked()[: args.cases]
    rng = np.random.default_rng(0)
    calls = [drawn(case, rng) for case in cases]
    with tempfile.TemporaryDirectory(prefix="sia-trimul-gpu-") as made:
        folder = Path(made)
        eager = [median_us(reference.reference, data) for data in calls]
        found = search(calls, folder)
        chosen = best_of(found)
        calls.clear()
        torch.cuda.empty_cache()
        sandbox = auto() if args.sandbox == "auto" else Process()
        seen, card = judged(chosen.knobs, cases[: args.protocol], folder, sandbox)
    for timed in seen:
        if timed.problem:
            raise SystemExit(f"{verify.name(timed.case)}: {timed.problem}")
    lines = [
        f"## trimul's Triton harness on one {card}",
        "",
        "Made by `python benchmarks/trimul_gpu.py`; "
        f"torch {torch.__version__}, triton {triton.__version__}. Microseconds of one call, inputs "
        "on the card. *Events*: this process, the median over "
        f"{MEASURED_MS} ms, the card's cache emptied between calls. *Protocol*: the task's own "
        f"measurement in the sandbox {sandbox.name}, the median of {ROUNDS} calls on inputs that "
        "are new each time, less that of a kernel that does nothing. Eager: PyTorch in float32 "
        "without tf32.",
        "",
        "| N x batch x C | eager, events | as it comes, events | best, events | eager, protocol "
        "| best, protocol | largest error, in tolerances |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = [
        eager,
        found[0].us,
        chosen.us,
        [verify.us(replace(timed, own_s=timed.eager_s)) for timed in seen],
        [verify.us(timed) for timed in seen],
    ]
    for k, case in enumerate(cases):
        cells = [f"{column[k]:,.0f}" if k < len(column) else "" for column in columns]
        error = f"{seen[k].error:.2f}" if k < len(seen) else ""
        lines.append(f"| {verify.name(case)} | {' | '.join(cells)} | {error} |")
    means = " | ".join(f"**{geomean(column):,.0f}**" for column in columns)
    lines += [f"| geometric mean of the column | {means} | |", ""]
    bests = [best_of(found[: k + 1]) for k in range(len(found))]
    kept = dict.fromkeys(one.change for one in bests if one is not found[0]) or ["nothing"]
    lines += [
        f"The knobs in the order of `space.yaml`, the best value of each kept: {'; '.join(kept)}.",
        "",
        "| setting | geometric mean | largest error, in tolerances | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {one.change} | {one.geomean_us:,.0f} | {one.error:.2f} | {one.problem} |"
        if one.us
        else f"| {one.change} | | | {one.problem} |"
        for one in found
    ]
    path = args.out / "reports" / "trimul_gpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
