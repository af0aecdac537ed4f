"""Two guests, the submission and the eager reference, called in turn on inputs that are always new.

On the CPU a call lasts from the message that hands over the inputs, which nobody knows before it,
until rows of the output, drawn at random afterwards, have been copied away. Its cost is the
processor time that the kernel counts for all threads and processes of the guest in between; the
wall clock runs beside it. What the same call costs with a kernel that does nothing is known from
the reference's guest, and is taken off both. While one guest is called every process of the other
one is stopped. On a GPU see `time_on_gpu`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sia.sandbox.protocol import Sandbox

Array = NDArray[np.float32]
Case = Mapping[str, Any]

ATOL = RTOL = 2e-2  # those of reference.py
SAMPLE = 2048  # rows of the output that are copied while the clock runs
MIN_ROUNDS = 3
INTERPRETED_S = 240.0  # of a call in Triton's interpreter
CALL_S = 5.0  # of later ones, or so many times as long as the reference
SLOWER = 20.0
DIGEST_RTOL = 1e-3


@dataclass(kw_only=True)
class Timed:
    """What was seen of one case; lists are aligned by round.

    Attributes:
        error: The largest error of all calls, in tolerances: right up to 1.
        answered: Whether the submission gave an output, right or wrong.
        problem: Why the case counts as wrong; empty if it does not.
        eager_s: Wall time of the reference.
        own_s: Wall time of the submission.
        eager_cpu_s: Processor time of the reference.
        own_cpu_s: Processor time of the submission.
        null_s: Of a kernel that does nothing: processor time on the CPU, wall time on a GPU.
    """

    case: Case
    error: float = 0.0
    answered: bool = False
    problem: str = ""
    eager_s: list[float] = field(default_factory=list)
    own_s: list[float] = field(default_factory=list)
    eager_cpu_s: list[float] = field(default_factory=list)
    own_cpu_s: list[float] = field(default_factory=list)
    null_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a guest on the CPU."""

    out: Array
    sample: Array
    wall_s: float
    cpu_s: float


class Arena:
    """The rules of a comparison.

    Args:
        guests: The module guest.py.
        inputs: The module inputs.py.
        sandbox: For both guests.
        rng: Of inputs and of what is sampled. Nobody in a guest may know its state.
        share: Of the tolerance, that may be used.
        first_call_s: Deadline of the first call of a case, which may compile.
    """

    def __init__(
        self,
        *,
        guests: Any,
        inputs: Any,
        sandbox: Sandbox,
        rng: np.random.Generator,
        share: float = 1.0,
        first_call_s: float = 60.0,
    ) -> None:
        self._guests = guests
        self._inputs = inputs
        self._sandbox = sandbox
        self._rng = rng
        self._share = share
        self._first_call_s = first_call_s
        self._number = 0

    def time_on_cpu(
        self, submission: Path, cases: Sequence[Case], *, rounds: int, budget_s: float
    ) -> tuple[list[Timed], dict[str, Any]]:
        """Every case once to warm up, then in up to `rounds` rounds of all cases.

        A case is dropped at its first fault. After `MIN_ROUNDS` rounds no new one begins once
        `budget_s` seconds have passed.

        Returns:
            What was seen of each case, in their order, and what the guest says of itself.

        Raises:
            ValueError: The submission cannot be loaded.
            RuntimeError: The reference cannot be run here.
        """
        found = [Timed(case=case) for case in cases]
        with ExitStack() as stack:
            eager, own = self._enter(stack, submission, "cpu")
            began = time.monotonic()
            for number in range(-1, rounds):
                if number >= MIN_ROUNDS and time.monotonic() - began > budget_s:
                    break
                for timed in found:
                    if not timed.problem:
                        self._pair(timed, eager, own, warm_up=number < 0)
            facts = dict(own.facts)
            if facts.get("triton") and not all(timed.problem for timed in found):
                own.thaw()
                try:
                    facts["built"] = own.ask({"op": "build"}, limit_s=self._first_call_s)["built"]
                except self._guests.GuestFailed as failure:
                    facts["build_problem"] = str(failure)
        return found, facts

    def check_interpreted(self, submission: Path, cases: Sequence[Case]) -> list[Timed]:
        """Each case once, with Triton's interpreter in place of a GPU; nothing is timed.

        Raises:
            ValueError: The submission cannot be loaded.
            RuntimeError: The reference cannot be run here.
        """
        found = [Timed(case=case) for case in cases]
        with ExitStack() as stack:
            eager, own = self._enter(stack, submission, "cpu", interpret=True)
            for timed in found:
                self._pair(timed, eager, own, warm_up=True, limit_s=INTERPRETED_S)
        return found

    def time_on_gpu(
        self, submission: Path, cases: Sequence[Case], *, rounds: int, device: str = "cuda"
    ) -> tuple[list[Timed], str]:
        """Times without the way to the card: loaded first, then made new by a secret, then called.

        The clock runs from the message with the secret, which scales every channel and weight, over
        the submission's answer, until a sum over its whole output has come back, with weights that
        are sent after that answer. The same with a kernel that does nothing is subtracted. The
        output is then fetched and compared with the reference and with the sum.

        Returns:
            What was seen of each case, and the name of the card.

        Raises:
            ValueError: The submission cannot be loaded.
            RuntimeError: The reference cannot be run here.
        """
        found = [Timed(case=case) for case in cases]
        with ExitStack() as stack:
            eager, own = self._enter(stack, submission, device)
            for timed in found:
                self._staged(timed, eager, own, rounds)
            return found, str(eager.facts["card"])

    def _enter(
        self, stack: ExitStack, submission: Path, device: str, *, interpret: bool = False
    ) -> tuple[Any, Any]:
        here = Path(__file__).resolve().parent
        guest, failed = self._guests.Guest, self._guests.GuestFailed
        try:
            eager = stack.enter_context(
                guest(
                    sandbox=self._sandbox,
                    submission=here / "eager.py",
                    also=(here / "reference.py",),
                    device=device,
                )
            )
            own = stack.enter_context(
                guest(
                    sandbox=self._sandbox,
                    submission=submission,
                    device=device,
                    interpret=interpret,
                )
            )
            eager.ready()
        except failed as failure:
            raise RuntimeError(f"the reference cannot be run here: {failure}") from failure
        try:
            own.ready()
        except failed as failure:
            raise ValueError(f"submission.py cannot be loaded: {failure}") from None
        return eager, own

    def _pair(
        self,
        timed: Timed,
        eager: Any,
        own: Any,
        *,
        warm_up: bool,
        limit_s: float | None = None,
    ) -> None:
        """One call of both on the same new inputs, in random order."""
        case, memory = timed.case, self._guests.Memory
        size = self._inputs.n_bytes(case)
        rows = math.prod(self._inputs.shapes(case)["x"][:3])
        sampled = self._rng.integers(0, rows, SAMPLE)
        with closing(memory(size)) as first, closing(memory(size)) as second:
            self._inputs.fill(case, self._inputs.views(case, first.block), self._rng)
            second.block[:] = first.block[:]
            order = [(eager, first), (own, second)]
            if self._rng.integers(2):
                order.reverse()
            calls = {}
            if warm_up:
                limit_s = limit_s or self._first_call_s
            else:
                limit_s = max(CALL_S, SLOWER * max(timed.eager_s, default=0.0))
            for guest, block in order:
                try:
                    calls[guest] = self._call(guest, case, block, sampled, limit_s=limit_s)
                except self._guests.GuestFailed as failure:
                    if guest is eager:
                        raise RuntimeError(f"the reference failed: {failure}") from failure
                    timed.problem = str(failure)
                    return
            null = self._call(
                eager, case, first, sampled, limit_s=self._first_call_s, kernel="null_kernel"
            )
        timed.answered = True
        theirs, ours = calls[own], calls[eager]
        self._judge(timed, theirs.out, ours.out)
        if not timed.problem and error(theirs.sample, ours.out[sampled]) > self._share:
            timed.problem = "the output was not complete when the submission said so"
        if not warm_up:
            timed.eager_s.append(ours.wall_s)
            timed.own_s.append(theirs.wall_s)
            timed.eager_cpu_s.append(ours.cpu_s)
            timed.own_cpu_s.append(theirs.cpu_s)
            timed.null_s.append(null.cpu_s)

    def _judge(self, timed: Timed, found: Array, expected: Array) -> None:
        worst = error(found, expected)
        timed.error = max(timed.error, worst)
        if not worst <= self._share:
            timed.problem = complaint(found, expected, worst, self._share)

    def _call(
        self,
        guest: Any,
        case: Case,
        block: Any,
        sampled: NDArray[np.int64],
        *,
        limit_s: float,
        kernel: str = "custom_kernel",
    ) -> Call:
        shape = self._inputs.shapes(case)["x"]
        with closing(self._guests.Memory(4 * math.prod(shape))) as memory:
            out = np.frombuffer(memory.block, np.float32).reshape(-1, shape[-1])
            out.fill(np.nan)  # what is not written is wrong
            self._number += 1
            message = {"op": "go", "number": self._number, "kernel": kernel}
            guest.thaw()
            try:
                guest.ask({"op": "case", "case": dict(case)}, memory, limit_s=limit_s)
                cpu_s = guest.cpu_s()
                began = time.perf_counter()
                guest.ask(message, block, limit_s=limit_s)
                sample = out[sampled]
                wall_s = time.perf_counter() - began
            finally:
                guest.freeze()
            cpu_s = guest.cpu_s() - cpu_s
        return Call(out=out, sample=sample, wall_s=wall_s, cpu_s=cpu_s)

    def _staged(self, timed: Timed, eager: Any, own: Any, rounds: int) -> None:
        case, memory = timed.case, self._guests.Memory
        shape = self._inputs.shapes(case)["x"]
        size = self._inputs.n_bytes(case)
        failed = self._guests.GuestFailed
        with ExitStack() as stack:
            block = stack.enter_context(closing(memory(size)))
            self._inputs.fill(case, self._inputs.views(case, block.block), self._rng)
            outs = {}
            for guest in (eager, own):
                result = stack.enter_context(closing(memory(4 * math.prod(shape))))
                outs[guest] = np.frombuffer(result.block, np.float32).reshape(-1, shape[-1])
                guest.thaw()
                try:
                    guest.ask(
                        {"op": "case", "case": dict(case)}, result, limit_s=self._first_call_s
                    )
                    guest.ask({"op": "load"}, block, limit_s=self._first_call_s)
                except failed as failure:
                    timed.problem = str(failure)
                    return
                finally:
                    guest.freeze()
            for number in range(-1, rounds):
                secret = int(self._rng.integers(2**48))
                null_s, _ = self._run(eager, secret, outs[eager], shape, kernel="null_kernel")
                eager_s, _ = self._run(eager, secret, outs[eager], shape)
                try:
                    own_s, digest = self._run(own, secret, outs[own], shape)
                except failed as failure:
                    timed.problem = str(failure)
                    return
                self._judge(timed, outs[own], outs[eager])
                timed.problem = timed.problem or digest
                if timed.problem:
                    return
                if number >= 0:
                    timed.null_s.append(null_s)
                    timed.eager_s.append(eager_s)
                    timed.own_s.append(own_s)

    def _run(
        self,
        guest: Any,
        secret: int,
        out: Array,
        shape: tuple[int, ...],
        *,
        kernel: str = "custom_kernel",
    ) -> tuple[float, str]:
        """Seconds from the secret to the digest, and what is wrong with the digest."""
        weights = int(self._rng.integers(2**48))
        self._number += 1
        message = {"op": "run", "number": self._number, "seed": secret, "kernel": kernel}
        out.fill(np.nan)
        guest.thaw()
        try:
            began = time.perf_counter()
            guest.ask(message, limit_s=self._first_call_s)
            answer = guest.ask({"op": "digest", "seed": weights}, limit_s=self._first_call_s)
            wall_s = time.perf_counter() - began
            guest.ask({"op": "fetch"}, limit_s=self._first_call_s)
        finally:
            guest.freeze()
        axes = self._inputs.digest_weights(shape, weights)
        rows = out @ axes[2]
        expected = float(np.einsum("bij,bi,j->", rows.reshape(shape[:3]), axes[0], axes[1]))
        scale = float(np.abs(rows).sum())
        claimed = answer.get("digest")
        if not isinstance(claimed, float) or not abs(claimed - expected) <= DIGEST_RTOL * scale:
            return wall_s, "the output changed after the answer"
        return wall_s, ""


def error(found: Array, expected: Array) -> float:
    """The largest error in tolerances; infinite where a value is not a number."""
    shares = np.abs(found - expected)
    shares /= ATOL + RTOL * np.abs(expected)
    worst = float(shares.max())
    return worst if worst == worst else math.inf


def complaint(found: Array, expected: Array, worst: float, share: float) -> str:
    """What is wrong with an output that misses the tolerance."""
    unwritten = int(np.isnan(found).sum())
    if unwritten:
        return f"{unwritten} of {found.size} values were not written or are not numbers"
    off = np.abs(found - expected) > share * (ATOL + RTOL * np.abs(expected))
    return f"{int(off.sum())} of {off.size} values are wrong, the worst by {worst:.3g} tolerances"
