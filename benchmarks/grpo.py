"""Throughput of a GRPO step, rollout and update, beside TRL's GRPOTrainer in the same run.

Both sides load the same random base and put the same LoRA on it, answer the same prompts with the
same number of tokens, and take one clipped step on them, in processes of their own that take turns:
a block of steps of ours, a block of TRL's, the order changing from one repeat to the next. One side
waits while the other works. The machine may be shared: CPU seconds are measured beside the clock.

    python -m venv .venv-trl
    .venv-trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.24.0 peft==0.21.2
    python benchmarks/grpo.py --trl .venv-trl/bin/python       reports/grpo_throughput.md
    python benchmarks/grpo.py --trl .venv-trl/bin/python --cases tiny --repeats 3 --out /tmp/try
    python benchmarks/grpo.py --trl .venv-trl/bin/python --device cuda     reports/grpo_gpu.md
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("sia", "trl")
PACKAGES = ("torch", "transformers", "peft", "trl", "lightning", "accelerate")
PROMPTS = 64
RANK, ALPHA, LR, CLIP = 16, 32, 1e-4, 0.2
WARM_UP = 2  # steps
MANY = 1_000_000  # steps: a worker ends when its input does


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the shape of a step.

    Attributes:
        prompt: Tokens of every prompt.
        answer: Tokens of every answer; none ends earlier.
        items: Prompts of a step.
        group: Answers to each of them.
        block: Steps at a time.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompt: int
    answer: int
    items: int = 8
    group: int = 8
    block: int = 3

    @property
    def base(self) -> str:
        """Name of the model's folder."""
        return f"{self.layers}x{self.width}-{self.vocabulary}"

    @property
    def tokens(self) -> int:
        """Of the answers of a step."""
        return self.items * self.group * self.answer


TINY = {
    "layers": 2, "width": 128, "inner": 256, "heads": 4, "kv_heads": 4, "vocabulary": 512,
}  # fmt: skip
SMALL = {
    "layers": 4, "width": 256, "inner": 512, "heads": 4, "kv_heads": 4, "vocabulary": 4096,
}  # fmt: skip
BILLION = {
    "layers": 22, "width": 2048, "inner": 5632, "heads": 32, "kv_heads": 4, "vocabulary": 32000,
}  # fmt: skip
SMOLLM2 = {  # four of its thirty layers
    "layers": 4, "width": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152,
}  # fmt: skip
GPU_CASES = {
    "1B": Case(**BILLION, prompt=256, answer=256, items=4, block=1),
}
CPU_CASES = {
    "tiny": Case(**TINY, prompt=64, answer=64),
    "tiny, long prompts": Case(**TINY, prompt=256, answer=64),
    "tiny, long answers": Case(**TINY, prompt=64, answer=256, block=1),
    "small": Case(**SMALL, prompt=64, answer=64, block=2),
    "small, long prompts": Case(**SMALL, prompt=256, answer=64, block=1),
    "smollm2, 4 layers": Case(**SMOLLM2, prompt=64, answer=64, items=2, block=1),
}
CASES = {**CPU_CASES, **GPU_CASES}
REPORTS = {"cpu": "grpo_throughput.md", "cuda": "grpo_gpu.md"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some steps of one side.

    Attributes:
        rollout_s: Of the clock, until the answers were there.
        cpu_s: Of all threads.
        peak_mib: Of the process on a CPU, of the allocator on a GPU.
    """

    steps: int
    tokens: int
    wall_s: float
    rollout_s: float
    cpu_s: float
    peak_mib: float


@dataclass(kw_only=True)
class Pace:
    """Where a worker waits for its turn, and what it has done since it began.

    A block goes from one `tick` to another, so it holds whole steps whatever happens in them.
    """

    report: Any
    device: str
    todo: int = WARM_UP
    steps: int = 0
    tokens: int = 0
    rollout_s: float = 0.0
    ticked: float = 0.0
    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def tick(self) -> None:
        """Once a step, at the same place of it."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        if self.steps == self.todo:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            if self.device == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**20
            block = Block(
                steps=self.steps, tokens=self.tokens, wall_s=time.perf_counter() - self.wall,
                rollout_s=self.rollout_s, cpu_s=time.process_time() - self.cpu, peak_mib=peak,
            )  # fmt: skip
            print(json.dumps(asdict(block)), file=self.report, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            self.todo, self.steps, self.tokens, self.rollout_s = int(line), 0, 0, 0.0
            self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.steps += 1
        self.ticked = time.perf_counter()

    def answered(self, tokens: int) -> None:
        """Once a step, when its answers are there."""
        self.rollout_s += time.perf_counter() - self.ticked
        self.tokens += tokens


def reward_of(answer: str) -> float:
    """Costs nothing, and hardly ever the same for two answers: no group is without a signal."""
    return zlib.crc32(answer.encode()) / 2**32


def make_base(folder: Path, case: Case) -> int:
    """Writes a Llama of random weights and a tokenizer; gives the number of parameters.

    The end-of-text token lies outside the model's vocabulary: no answer ends before its time.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, **{f"w{k}": k for k in range(1, case.vocabulary)}}
    vocabulary["<end>"] = case.vocabulary
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.width, intermediate_size=case.inner,
        num_hidden_layers=case.layers, num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads, max_position_embeddings=1024, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    if case in GPU_CASES.values():
        model.to(torch.bfloat16)
    model.generation_config.eos_token_id = case.vocabulary
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def prompts(case: Case) -> list[str]:
    """The same on both sides."""
    return [
        " ".join(
            f"w{1 + zlib.crc32(f'{n} {k}'.encode()) % (case.vocabulary - 1)}"
            for k in range(case.prompt)
        )
        for n in range(PROMPTS)
    ]


def run_sia(case: Case, base: Path, work: Path, pace: Pace) -> None:
    """Ours, as `python -m sia.weights` does it."""
    from sia.weights.data import Rollouts
    from sia.weights.policy import Item
    from sia.weights.recipes import OnPolicy, recipe
    from sia.weights.rollout import Answers, TrainTask
    from sia.weights.update import Limits, fit, make_policy

    class Paced(Rollouts):
        def draw(self, number: int) -> Answers:
            pace.tick()
            answers = super().draw(number)
            pace.answered(int(answers.tokens.mask_BT.sum()))
            return answers

    chosen = recipe(
        {"name": "grpo", "steps": MANY, "items": case.items, "group": case.group, "lr": LR,
         "rank": RANK, "alpha": ALPHA, "clip_low": CLIP, "clip_high": CLIP}
    )  # fmt: skip
    assert isinstance(chosen, OnPolicy)
    policy = make_policy(
        {"kind": "causal_lm", "base": str(base), "max_answer_tokens": case.answer},
        chosen, device=pace.device, seed=0,
    )  # fmt: skip
    items = [Item(id=str(n), prompt=prompt) for n, prompt in enumerate(prompts(case))]
    task = TrainTask(
        items=items,
        rows={item.id: {} for item in items},
        reward_of=lambda row, answer: reward_of(answer),
    )
    shutil.rmtree(work, ignore_errors=True)  # a checkpoint there would be gone on from
    work.mkdir(parents=True)
    fit(
        policy=policy, recipe=chosen, source=Paced(policy=policy, recipe=chosen, task=task, seed=0),
        work=work, seed=0, device=pace.device, checkpoint_steps=Limits().checkpoint_steps,
        deadline=None,
    )  # fmt: skip


def run_trl(case: Case, base: Path, work: Path, pace: Pace) -> None:
    """TRL's, with everything switched off that a step does not need."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Paced(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.tick()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pace.tick()

    def reward(
        completions: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        pace.answered(sum(len(ids) for ids in completion_ids))
        return [reward_of(answer) for answer in completions]

    GRPOTrainer(
        model=str(base),
        args=GRPOConfig(
            output_dir=str(work), use_cpu=pace.device == "cpu", bf16=pace.device == "cuda",
            model_init_kwargs={"dtype": "bfloat16" if pace.device == "cuda" else "float32"},
            gradient_checkpointing=False,
            per_device_train_batch_size=case.items * case.group, gradient_accumulation_steps=1,
            num_generations=case.group, max_completion_length=case.answer, temperature=1.0,
            beta=0.0, epsilon=CLIP, loss_type="grpo", num_iterations=1, learning_rate=LR,
            lr_scheduler_type="constant_with_warmup", warmup_steps=5, max_grad_norm=1.0,
            optim="adamw_torch_fused", max_steps=MANY, dataloader_num_workers=0, disable_tqdm=True,
            logging_strategy="no", save_strategy="no", report_to="none", seed=0,
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": prompts(case)}),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
        callbacks=[Paced()],
    ).train()  # fmt: skip


def work_as(side: str, case: Case, folder: Path, threads: int, device: str) -> None:
    """What a worker does until its input ends."""
    import torch

    torch.set_num_threads(threads)
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report
    pace = Pace(report=report, device=device)
    run = {"sia": run_sia, "trl": run_trl}[side]
    run(case, folder / case.base, folder / f"work-{side}", pace)


@contextlib.contextmanager
def worker(
    side: str, name: str, folder: Path, threads: int, python: str, device: str
) -> Iterator[Any]:
    """A process of one side that has done its warm-up; its log is in the folder."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / f"{side}.log").open("w") as log:
        process = subprocess.Popen(
            [python, __file__, "--side", side, "--cases", name, "--work", str(folder),
             "--threads", str(threads), "--device", device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def block_of(process: Any, steps: int, log: Path) -> Block:
    """Some steps; 0: those of the warm-up.

    Raises:
        SystemExit: The worker has failed.
    """
    if steps:
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{log}: {log.read_text()[-2000:]}")
    return Block(**json.loads(line))


def measure(
    name: str, folder: Path, threads: int, repeats: int, pythons: dict[str, str], device: str
) -> dict[str, list[Block]]:
    """Blocks of both sides by turns, the i-th of one beside the i-th of the other."""
    case, found = CASES[name], {side: [] for side in SIDES}
    with contextlib.ExitStack() as stack:
        processes = {}
        for side in SIDES:
            process = stack.enter_context(
                worker(side, name, folder, threads, pythons[side], device)
            )
            block_of(process, 0, folder / f"{side}.log")
            processes[side] = process
        for repeat in range(repeats):
            for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                block = block_of(processes[side], case.block, folder / f"{side}.log")
                if block.tokens != case.block * case.tokens:
                    raise SystemExit(f"{side}: {block.tokens} tokens, not {case.tokens} a step")
                found[side].append(block)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the smallest and largest in brackets."""
    return (
        f"{statistics.median(values):.{digits}f} "
        f"[{min(values):.{digits}f}, {max(values):.{digits}f}]"
    )


def row(name: str, case: Case, parameters: int, threads: int, found: dict[str, list[Block]]) -> str:
    """A line of the table."""
    pairs = list(zip(found["sia"], found["trl"], strict=True))
    rates = [spread([b.tokens / b.wall_s for b in found[side]], 0) for side in SIDES]
    parts = [
        f"{statistics.median(1000 * b.rollout_s / b.steps for b in found[side]):.0f} + "
        f"{statistics.median(1000 * (b.wall_s - b.rollout_s) / b.steps for b in found[side]):.0f}"
        for side in SIDES
    ]
    peaks = [f"{found[side][-1].peak_mib:.0f}" for side in SIDES]
    return (
        f"| {name} | {parameters / 1e6:.1f} | {case.prompt} + {case.answer} "
        f"| {case.items} x {case.group} | {threads} | {rates[0]} | {rates[1]} "
        f"| **{statistics.median(t.wall_s / s.wall_s for s, t in pairs):.2f}** "
        f"[{min(t.wall_s / s.wall_s for s, t in pairs):.2f}, "
        f"{max(t.wall_s / s.wall_s for s, t in pairs):.2f}] "
        f"| {spread([t.cpu_s / s.cpu_s for s, t in pairs], 2)} "
        f"| {parts[0]} | {parts[1]} | {peaks[0]} | {peaks[1]} |"
    )


def versions(python: str) -> dict[str, str]:
    """Of the packages that an interpreter has."""
    code = (
        "import json, sys; from importlib import metadata\n"
        "there = {d.metadata['Name'].lower() for d in metadata.distributions()}\n"
        "print(json.dumps({n: metadata.version(n) for n in sys.argv[1:] if n in there}))"
    )
    done = subprocess.run(
        [python, "-c", code, *PACKAGES], capture_output=True, text=True, timeout=120, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def header(repeats: int, found: dict[str, dict[str, str]], device: str) -> list[str]:
    """What stands above the table."""
    where, option = "float32 on a CPU", ""
    if device == "cuda":
        import torch

        where = f"a base in bfloat16 on one {torch.cuda.get_device_name()}"
        option = " --device cuda"
    listed = {side: ", ".join(f"{n} {v}" for n, v in found[side].items()) for side in SIDES}
    return [
        "## A GRPO step beside TRL's",
        "",
        f"Made by `python benchmarks/grpo.py --trl .venv-trl/bin/python{option}`. Tokens of "
        "answers per second of a whole step: rollout, rewards, one clipped update of a LoRA (rank "
        f"16 on all linear layers, no reference model), {where}. Random Llamas; both sides load "
        "the same files, answer the same prompts and write exactly as many tokens. Blocks of steps "
        f"by turns, {repeats} of each side; median and [smallest, largest]; a ratio is that of two "
        "neighbouring blocks. *CPU* counts the seconds of all threads and is what a busy machine "
        "disturbs least. Ours saves its checkpoint every ten steps as always; TRL's saves nothing.",
        "",
        f"Ours: {listed['sia']}. TRL's: {listed['trl']}. {os.cpu_count()} cores.",
        "",
        "| model | million parameters | tokens of prompt + answer | prompts x group | threads "
        "| tokens/s, ours | tokens/s, TRL | ratio | ratio, CPU | ms rollout + update, ours "
        "| ms rollout + update, TRL | peak MiB, ours | peak MiB, TRL |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]


def main() -> None:
    """Measures every case and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", metavar="PYTHON", help="an interpreter that has TRL")
    parser.add_argument("--device", choices=REPORTS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="all that suit the device")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "grpo", help="scratch")
    parser.add_argument("--out", type=Path, default=ROOT, help="reports/ lies below it")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work_as(args.side, CASES[args.cases[0]], args.work, args.threads[0], args.device)
        return
    if not args.trl:
        parser.error("--trl: there is nothing to compare with")
    pythons = {"sia": sys.executable, "trl": args.trl}
    found = {side: versions(pythons[side]) for side in SIDES}
    if found["sia"]["torch"] != found["trl"]["torch"]:
        parser.error(f"--trl has torch {found['trl']['torch']}, not {found['sia']['torch']}")
    lines = header(args.repeats, found, args.device)
    for name in args.cases or (GPU_CASES if args.device == "cuda" else CPU_CASES):
        parameters = make_base(args.work / CASES[name].base, CASES[name])
        for threads in args.threads:
            blocks = measure(name, args.work, threads, args.repeats, pythons, args.device)
            lines.append(row(name, CASES[name], parameters, threads, blocks))
            print(lines[-1], flush=True)
    path = args.out / "reports" / REPORTS[args.device]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
