"""Whether every recipe teaches: a small language model learns to sort four digits, three seeds.

For each seed a random model (two layers, one token a character) is taught the form of an answer:
the digits of the prompt in any order. Every recipe starts from there with the same learning rate
and its own defaults otherwise, in a process of its own on one core. Before and after, 500 items
that no update sees are answered once each; the difference is tested over items.

    python benchmarks/learning.py                     reports/weights_learning.md and the curves
    python benchmarks/learning.py --recipes grpo --seeds 0 --steps 20 --out /tmp/try
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent / "sorting"))
import train as task  # noqa: E402

RECIPES = ("best_of_n", "reinforce", "grpo", "ppo", "entropic", "dpo", "sft")
SETTINGS = {"lr": 1e-3}
LIMIT_S = 300
FORM_STEPS, FORM_BATCH, FORM_LR = 400, 128, 2e-3
DRAWS = 10_000
EXAMINING = threading.Lock()  # transformers cannot be imported by two threads at once


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One recipe on one seed.

    Attributes:
        before: Mean reward on held-out items.
        low: Lower end of the 95 % interval of the gain, paired over items.
        high: Its upper end.
        wall_s: Of the whole process, imports included.
    """

    recipe: str
    seed: int
    before: float
    after: float
    low: float
    high: float
    steps: int
    ended: str
    wall_s: float
    seconds: float
    tokens_per_s: float
    kl: float
    entropy: float
    silent_share: float | None
    rewards: tuple[float, ...]


def teach_form(folder: Path, seed: int) -> None:
    """A base that answers with the digits of the prompt in any order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sia.weights.tiny import make_base

    make_base(folder, alphabet="0123456789>", seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FORM_LR)
    rng = random.Random(seed)
    prompts = [item["prompt"] for item in task.items(folder)]
    for _ in range(FORM_STEPS):
        texts = []
        for prompt in rng.sample(prompts, FORM_BATCH):
            digits = list(prompt[:-1])
            rng.shuffle(digits)
            texts.append(prompt + "".join(digits))
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        ids = torch.cat([ids, torch.full((len(ids), 1), tokenizer.eos_token_id)], 1)
        labels = ids.clone()
        labels[:, : task.DIGITS + 1] = -100
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)


def examine(base: Path, adapter: Path | None, seed: int) -> list[float]:
    """Reward of one sampled answer to each held-out item."""
    from sia.weights.causal_lm import CausalLM

    policy = CausalLM(base=str(base), max_answer_tokens=6)
    if adapter is not None:
        policy.load_adapter(adapter)
    items = task.held_out()
    prompts = [item["prompt"] for item in items]
    answers = policy.sample(prompts, group=1, temperature=1.0, seed=seed).answers
    return [task.reward(item, answer) for item, answer in zip(items, answers, strict=True)]


def measure(work: Path, recipe: str, seed: int, steps: int) -> Outcome:
    """One update in its own process, examined before and after."""
    import numpy as np

    from sia.seeds import stream
    from sia.verify.stats import paired_difference
    from sia.weights.update import read_record

    base, out = work / f"base-{seed}", work / f"{recipe}-{seed}"
    job = {
        "policy": {"kind": "causal_lm", "base": str(base), "max_answer_tokens": 6},
        "recipe": {"name": recipe, "steps": steps, **SETTINGS},
        "task": str(Path(task.__file__)), "public": str(work), "out": str(out), "seed": seed,
        "device": "cpu", "limits": {"wall_s": LIMIT_S},
    }  # fmt: skip
    path = work / f"{recipe}-{seed}.json"
    path.write_text(json.dumps(job))
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sia.weights", str(path)],
        capture_output=True, text=True, timeout=2 * LIMIT_S, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wall_s = time.monotonic() - begun
    if done.returncode != 0:
        raise SystemExit(f"{path}: {done.stderr}")
    record = read_record(out)
    with EXAMINING:
        before, after = (np.array(examine(base, adapter, seed)) for adapter in (None, out))
    gain = paired_difference(before, after, draws=DRAWS, rng=stream(seed, "learning"))
    report = record.report
    return Outcome(
        recipe=recipe,
        seed=seed,
        before=float(before.mean()),
        after=float(after.mean()),
        low=gain.low,
        high=gain.high,
        steps=report.steps,
        ended=report.ended,
        wall_s=wall_s,
        seconds=report.seconds,
        tokens_per_s=report.tokens_per_s,
        kl=report.kl or 0.0,
        entropy=report.entropy or 0.0,
        silent_share=report.silent_share,
        rewards=tuple(point["reward"] for point in record.curve if point["reward"] is not None),
    )


def table(outcomes: Sequence[Outcome], command: str) -> str:
    """The report as Markdown."""
    lines = [
        "## Learning: a language model of two layers sorts four digits",
        "",
        f"Made by `{command}`. Mean reward (share of places that are right) on {task.HELD_OUT} "
        "items that no update saw, one sampled answer each; the 95 % interval of the gain is a "
        "bootstrap over items, paired. One core a process; *wall* includes imports and probes, "
        "*steps/s* does not. Machines are noisy: compare within the table. Curves: "
        "[docs/weights_learning.svg](../docs/weights_learning.svg).",
        "",
        "| recipe | seed | before | after | gain, 95 % interval | steps | wall s | steps/s "
        "| tokens/s | KL to base | entropy | silent groups |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        silent = "" if o.silent_share is None else f"{o.silent_share:.2f}"
        lines.append(
            f"| {o.recipe} | {o.seed} | {o.before:.3f} | {o.after:.3f} | {o.after - o.before:+.3f} "
            f"[{o.low:+.3f}, {o.high:+.3f}] | {o.steps} | {o.wall_s:.0f} "
            f"| {o.steps / o.seconds:.1f} | {o.tokens_per_s:.0f} | {o.kl:.2f} | {o.entropy:.2f} "
            f"| {silent} |"
        )
    worst = min(outcomes, key=lambda o: o.low)
    lines += [
        "",
        f"Smallest lower end of all intervals: {worst.low:+.3f} "
        f"({worst.recipe}, seed {worst.seed}).",
    ]
    return "\n".join(lines) + "\n"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Mean reward of each round's answers, all seeds of a recipe in one panel."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sia"
    import matplotlib.pyplot as plt
    import numpy as np

    names = [name for name in RECIPES if any(o.recipe == name and o.rewards for o in outcomes)]
    figure, axes = plt.subplots(1, len(names), figsize=(2.2 * len(names), 2.4), sharey=True)
    for name, axis in zip(names, np.atleast_1d(axes), strict=True):
        for o in (o for o in outcomes if o.recipe == name):
            smooth = np.convolve(o.rewards, np.ones(5) / 5, "valid")
            axis.plot(np.arange(len(smooth)) + 5, smooth, linewidth=1, label=f"seed {o.seed}")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylim(0, 1)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("mean reward (5 steps)", fontsize=8)
    np.atleast_1d(axes)[-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs everything and writes the table and the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "learning",
        help="scratch; outcomes that lie there are not measured again",
    )
    parser.add_argument("--out", type=Path, default=ROOT, help="reports/ and docs/ lie below it")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    for folder in ("reports", "docs"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        if not (args.work / f"base-{seed}" / "model.safetensors").is_file():
            teach_form(args.work / f"base-{seed}", seed)
    jobs = [(recipe, seed) for recipe in args.recipes for seed in args.seeds]

    def one(job: tuple[str, int]) -> Outcome:
        kept = args.work / f"{job[0]}-{job[1]}.outcome.json"
        if kept.is_file():
            return msgspec.json.decode(kept.read_bytes(), type=Outcome)
        found = measure(args.work, *job, args.steps)
        kept.write_bytes(msgspec.json.encode(found))
        print(
            f"{found.recipe} seed {found.seed}: {found.before:.3f} -> {found.after:.3f}", flush=True
        )
        return found

    with ThreadPoolExecutor(args.workers) as pool:
        outcomes = list(pool.map(one, jobs))
    command = "python benchmarks/learning.py"
    (args.out / "reports" / "weights_learning.md").write_text(table(outcomes, command))
    draw(outcomes, args.out / "docs" / "weights_learning.svg")


if __name__ == "__main__":
    main()
