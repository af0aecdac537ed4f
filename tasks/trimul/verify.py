"""Speed-up of one submission over the eager reference: measured from outside, checked every time.

The submission runs in a sandbox of its own, without the labels, and says nothing that is believed:
see arena.py for the rules and guest.py for the process.
"""

import json
import math
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sia.sandbox.auto import auto
from sia.tasks.task import load_module

HERE = Path(__file__).resolve().parent
SUBMISSION = "submission.py"
MAX_BYTES = 2**20
GPU = Path("/dev/nvidiactl")
DRAWS = 200  # of the bootstrap over rounds

Array = NDArray[np.float64]

arena, guests, inputs = (load_module(HERE / f"{name}.py") for name in ("arena", "guest", "inputs"))


def verify(submission_dir: Path, labels_dir: Path) -> dict[str, Any]:
    """Geometric mean over the split's cases of how many times faster than the reference it is.

    Times are noisy: two verifications of one submission differ. `metrics.noise` says by how much.

    Args:
        submission_dir: Folder with submission.py.
        labels_dir: Folder with cases.json.

    Returns:
        score, n_items, n_answered, metrics, symptoms, items and breakdown. An item is a case; its
        value is linear in the logarithm of its speed-up, so that the plain mean is the score. One
        wrong or missing case makes the score 0.

    Raises:
        ValueError: There is no submission.py that can be loaded.
        RuntimeError: The reference cannot be run on this machine.
    """
    plan = json.loads((labels_dir / "cases.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="sia-trimul-submission-") as folder:
        submission = Path(folder) / SUBMISSION
        submission.write_bytes(read_submission(submission_dir))
        sandbox = auto()
        sandbox.check()
        # Not of the seed alone: where the labels could be read, the inputs still cannot be known.
        rng = np.random.default_rng([plan["seed"], secrets.randbits(64)])
        ground = arena.Arena(
            guests=guests, inputs=inputs, sandbox=sandbox, rng=rng, share=plan["tolerance_share"]
        )
        timed, facts = ground.time_on_cpu(
            submission, plan["cases"], rounds=plan["rounds"], budget_s=plan["budget_s"]
        )
        triton = ground.check_interpreted(submission, plan["triton"]) if facts["triton"] else []
        gpu: tuple[list[Any], str] = ([], "")
        if GPU.exists() and not any(each.problem for each in (*timed, *triton)):
            gpu = ground.time_on_gpu(submission, plan["gpu"], rounds=plan["gpu_rounds"])
    return result(timed, triton, facts, gpu)


def read_submission(folder: Path) -> bytes:
    """The one file of a submission.

    Raises:
        ValueError: It is missing, no plain file, too large or not Python.
    """
    path = folder / SUBMISSION
    # A link could lead to the labels.
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{SUBMISSION} is missing or is not a plain file")
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise ValueError(f"{SUBMISSION} has more than {MAX_BYTES} bytes")
    try:
        compile(content, SUBMISSION, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{SUBMISSION} is not Python: {error}") from None
    return content


def result(
    timed: Sequence[Any],
    triton: Sequence[Any],
    facts: Mapping[str, Any],
    gpu: tuple[Sequence[Any], str],
) -> dict[str, Any]:
    """What the contract of a verifier asks for, from what was seen."""
    names = [name(each.case) for each in timed]
    wrong = {n: each.problem for n, each in zip(names, timed, strict=True) if each.problem}
    wrong |= {f"triton {name(each.case)}": each.problem for each in triton if each.problem}
    wrong |= {f"gpu {name(each.case)}": each.problem for each in gpu[0] if each.problem}
    logs = [0.0 if each.problem else math.log(speed_up(each)) for each in timed]
    score = 0.0 if wrong else math.exp(float(np.mean(logs)))
    metrics = {
        "correct_share": 1 - sum(bool(each.problem) for each in timed) / len(timed),
        "error_share": max(each.error for each in timed),
        "rounds": float(min((len(each.own_s) for each in timed), default=0)),
    }
    if not wrong:
        metrics |= {
            "noise": noise(timed),
            "speedup_wall": _geometric(timed, lambda each: min(each.eager_s) / min(each.own_s)),
            "speedup_median": _geometric(
                timed, lambda each: float(np.divide(*map(np.median, costs(each))))
            ),
            "overhead_share": float(
                np.mean([min(each.null_s) / min(each.own_cpu_s) for each in timed])
            ),
        }
    metrics |= triton_metrics(triton, facts) | gpu_metrics(gpu[0])
    breakdown = {
        "cases": {n: _seen(each) for n, each in zip(names, timed, strict=True)},
        "wrong": wrong,
    }
    if "build_problem" in facts:
        breakdown["triton_build_problem"] = {"": str(facts["build_problem"])}
    if gpu[1]:
        breakdown["gpu"] = {gpu[1]: {name(each.case): us(each) for each in gpu[0]}}
    return {
        "score": score,
        "n_items": len(timed),
        "n_answered": sum(each.answered for each in timed),
        "metrics": metrics,
        "symptoms": {
            "error_share": max(each.error for each in timed),
            "wrong_share": len(wrong) / (len(timed) + len(triton) + len(gpu[0])),
            **_gaps(timed, logs, bool(wrong)),
        },
        "items": {
            n: score * (1 + log - math.log(score)) if score else 0.0
            for n, log in zip(names, logs, strict=True)
        },
        "breakdown": breakdown,
    }


def costs(timed: Any) -> tuple[Array, Array]:
    """Processor time of the reference and of the submission by round, measuring taken off."""
    eager, own = np.array(timed.eager_cpu_s), np.array(timed.own_cpu_s)
    null = min(timed.null_s)
    return _without_measuring(eager, null), _without_measuring(own, null)


def speed_up(timed: Any) -> float:
    """Of one case: the least processor time of the reference over that of the submission.

    Other processes can only make a call dearer (they empty its caches and share its core), so the
    cheapest of several says most about the call itself.
    """
    eager, own = costs(timed)
    return float(eager.min() / own.min())


def noise(timed: Sequence[Any]) -> float:
    """Half of the 95 % interval of the score over its value, by resampling rounds."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        total = 0.0
        for each in timed:
            eager, own = costs(each)
            rounds = rng.integers(0, len(own), len(own))
            total += math.log(eager[rounds].min() / own[rounds].min())
        draws.append(math.exp(total / len(timed)))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float((high - low) / (high + low))


def triton_metrics(triton: Sequence[Any], facts: Mapping[str, Any]) -> dict[str, float]:
    """Share of right cases under the interpreter, and kernels built for each architecture."""
    if not triton:
        return {}
    found = {"triton_correct": sum(not each.problem for each in triton) / len(triton)}
    built = facts.get("built")
    if isinstance(built, dict):
        numbers = {k: v for k, v in built.items() if isinstance(k, str) and isinstance(v, int)}
        found |= {f"triton_{k}": float(v) for k, v in sorted(numbers.items())[:8]}
    return found


def us(timed: Any) -> float:
    """Microseconds of one call on a GPU, the measured cost of measuring taken off."""
    return 1e6 * float(_without_measuring(np.median(timed.own_s), float(np.median(timed.null_s))))


def gpu_metrics(gpu: Sequence[Any]) -> dict[str, float]:
    """Microseconds of every ranked case and their geometric mean; empty without a GPU."""
    if not gpu or any(each.problem for each in gpu):
        return {}
    each_us = {f"us_{name(each.case)}": us(each) for each in gpu}
    return {"us_geomean": math.exp(float(np.mean(np.log(list(each_us.values()))))), **each_us}


def name(case: Mapping[str, Any]) -> str:
    """A case in one word: N, B, C, values and mask."""
    masked = "" if case["mask"] == "none" else "-masked"
    return f"{case['n']}x{case['batch']}x{case['dim']}-{case['values']}{masked}"


def _without_measuring(spent: Any, null: float) -> Any:
    """At most half of a call can be the measuring: what is near zero would be noise alone."""
    return spent - np.minimum(null, spent / 2)


def _seen(timed: Any) -> dict[str, float]:
    if timed.problem or not timed.own_s:
        return {"speedup": 0.0}
    return {
        "speedup": speed_up(timed),
        "eager_ms": 1e3 * float(costs(timed)[0].min()),
        "own_ms": 1e3 * float(costs(timed)[1].min()),
    }


def _gaps(timed: Sequence[Any], logs: Sequence[float], wrong: bool) -> dict[str, float]:
    """How much less, in logarithms, is gained on masked and on large cases than on the others."""
    if wrong:
        return {}
    middle = float(np.median([each.case["n"] for each in timed]))
    groups: dict[str, Callable[[Any], bool]] = {
        "masked_gap": lambda case: case["mask"] != "none",
        "large_gap": lambda case: case["n"] > middle,
    }
    found = {}
    for key, belongs in groups.items():
        inside = [log for log, each in zip(logs, timed, strict=True) if belongs(each.case)]
        outside = [log for log, each in zip(logs, timed, strict=True) if not belongs(each.case)]
        if inside and outside:
            found[key] = float(np.mean(outside) - np.mean(inside))
    return found


def _geometric(timed: Sequence[Any], ratio: Callable[[Any], float]) -> float:
    return math.exp(float(np.mean([math.log(ratio(each)) for each in timed])))
