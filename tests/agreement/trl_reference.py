"""Losses and gradients of TRL's trainers on small inputs, for tests/unit/weights/test_agreement.py.

Runs in an environment of its own and writes numbers only:

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0 torch==2.13.0 peft==0.21.2
    /tmp/trl/bin/python tests/agreement/trl_reference.py

The model has no layers between embedding and head, so that a reader of the numbers can compute its
logits in one line: (rms_norm(embedding[token]) * norm) @ head.T. Each case holds a start (the
sampling policy and the base) and the weights that the loss was computed at.
"""

import copy
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

OUT = Path(__file__).with_name("trl.json")
V, D, GROUP, LONGEST = 8, 4, 4, 5
PAD, EOS = 0, 1
PROMPTS = [[2, 3], [4, 5, 6]]
ANSWERS = [[2, 1], [3, 4, 1], [5, 6, 7, 2, 3], [7, 1], [6, 6, 1], [2, 3, 4, 5, 1], [1], [4, 3, 1]]
REWARDS = [1.0, 0.0, 0.25, 0.0, 2.0, -1.0, 0.5, 0.5]


def base(folder: Path) -> None:
    """A model without layers and its tokenizer, on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=0,
        num_attention_heads=1, num_key_value_heads=1, pad_token_id=PAD, eos_token_id=EOS,
        bos_token_id=None, initializer_range=0.7,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0"
    ).save_pretrained(folder)


def weights(model: Any) -> dict[str, Any]:
    """Embedding, norm and head."""
    return {
        "embedding": model.model.embed_tokens.weight.tolist(),
        "norm": model.model.norm.weight.tolist(),
        "head": model.lm_head.weight.tolist(),
    }


def move(model: Any) -> None:
    """Away from the start, as a few steps would."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)


def measured(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of a trainer at its present weights."""
    model = trainer.model
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return {
        "weights": weights(model),
        "loss": loss.item(),
        "gradient": {
            "embedding": model.model.embed_tokens.weight.grad.tolist(),
            "norm": model.model.norm.weight.grad.tolist(),
            "head": model.lm_head.weight.grad.tolist(),
        },
    }


def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """The same rewards whatever is answered."""
    return list(REWARDS)


def policy_gradient(kind: Any, config: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """GRPO or RLOO: advantages at the start, then loss and gradients after a move."""
    text = [" ".join(f"w{t}" for t in prompt) for prompt in PROMPTS]
    trainer = kind(
        model=str(folder),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": text}),
        args=config(
            output_dir=str(folder / "out"), per_device_train_batch_size=len(ANSWERS),
            num_generations=GROUP, max_completion_length=LONGEST, num_iterations=2,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_dropout=True, **options,
        ),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    generated = copy.deepcopy(ANSWERS)
    trainer._generate_single_turn = lambda *_: (
        (generated, None) if kind is GRPOTrainer else generated
    )
    start = weights(trainer.model)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(
        [{"prompt": text[i // GROUP]} for i in range(len(ANSWERS))]
    )
    move(trainer.model)
    return {
        "options": options,
        "start": start,
        "advantages": inputs["advantages"].tolist(),
        **measured(trainer, inputs),
    }


def dpo(folder: Path, beta: float) -> dict[str, Any]:
    """DPO on two pairs."""
    rows = {"prompt": [], "chosen": [], "rejected": []}
    pairs = [(0, ANSWERS[0], ANSWERS[1]), (1, ANSWERS[4], ANSWERS[5])]
    for prompt, chosen, rejected in pairs:
        rows["prompt"].append(" ".join(f"w{t}" for t in PROMPTS[prompt]))
        rows["chosen"].append(" " + " ".join(f"w{t}" for t in chosen))
        rows["rejected"].append(" " + " ".join(f"w{t}" for t in rejected))
    trainer = DPOTrainer(
        model=str(folder),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        train_dataset=Dataset.from_dict(rows),
        args=DPOConfig(
            output_dir=str(folder / "out"), beta=beta, per_device_train_batch_size=2,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    start = weights(trainer.model)
    inputs = trainer.data_collator(
        [
            {"prompt_ids": PROMPTS[prompt], "chosen_ids": chosen, "rejected_ids": rejected}
            for prompt, chosen, rejected in pairs
        ]
    )
    move(trainer.model)
    return {"options": {"beta": beta}, "start": start, "pairs": pairs, **measured(trainer, inputs)}


def sft(folder: Path) -> dict[str, Any]:
    """Cross-entropy on answers, prompts left out."""
    trainer = SFTTrainer(
        model=str(folder),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3"], "completion": [" w2"]}),
        args=SFTConfig(
            output_dir=str(folder / "out"), completion_only_loss=True, packing=False,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    start = weights(trainer.model)
    rows = []
    for i, answer in enumerate(ANSWERS):
        prompt = PROMPTS[i // GROUP]
        rows.append(
            {
                "input_ids": prompt + answer,
                "completion_mask": [0] * len(prompt) + [1] * len(answer),
                "labels": [-100] * len(prompt) + answer,
            }
        )
    inputs = trainer.data_collator(rows)
    move(trainer.model)
    return {"options": {}, "start": start, **measured(trainer, inputs)}


def main() -> None:
    """Writes trl.json beside this file."""
    torch.use_deterministic_algorithms(True)
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base(folder)
        for key, options in {
            "grpo": {"loss_type": "grpo", "beta": 0.1},
            "grpo plain kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
            "grpo batch scale": {"loss_type": "grpo", "scale_rewards": "batch"},
            "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
            "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        }.items():
            cases[key] = policy_gradient(GRPOTrainer, GRPOConfig, folder, **options)
        cases["rloo"] = policy_gradient(
            RLOOTrainer, RLOOConfig, folder, beta=0.0, normalize_advantages=False
        )
        cases["dpo"] = dpo(folder, beta=0.3)
        cases["sft"] = sft(folder)
    versions = {name: version(name) for name in ("trl", "torch", "transformers")}
    document = {
        "made_by": versions,
        "command": "python tests/agreement/trl_reference.py",
        "prompts": PROMPTS,
        "answers": ANSWERS,
        "rewards": REWARDS,
        "group": GROUP,
        "longest": LONGEST,
        "cases": cases,
    }
    OUT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
