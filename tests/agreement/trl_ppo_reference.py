"""PPO losses and gradients of the last TRL with a PPO trainer of separate methods (0.11).

Later versions have no PPO. Runs in an environment of its own and writes numbers only:

    python -m venv /tmp/trl-ppo
    /tmp/trl-ppo/bin/pip install trl==0.11.4 transformers==4.45.2 torch==2.13.0 rich \\
        "numpy<2" "pyarrow<22"
    /tmp/trl-ppo/bin/python tests/agreement/trl_ppo_reference.py
"""

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl import PPOTrainer

OUT = Path(__file__).with_name("trl_ppo.json")
SETTINGS = {
    "gamma": 0.97, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.15, "vf_coef": 0.4,
    "ratio_threshold": 1e9, "whiten_rewards": False, "kl_penalty": "kl",
}  # fmt: skip
KL_COEF = 0.3


def main() -> None:
    """Writes trl_ppo.json beside this file."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    trainer: Any = SimpleNamespace(
        config=SimpleNamespace(**SETTINGS), kl_ctl=SimpleNamespace(value=KL_COEF)
    )
    trainer._kl_penalty = lambda *given: PPOTrainer._kl_penalty(trainer, *given)
    B, T, V = 4, 5, 6
    mask = (torch.arange(T) < torch.tensor([5, 2, 4, 1])[:, None]).long()
    tokens = torch.randint(V, (B, T), generator=random)
    logits = noise(B, T, V).requires_grad_()
    values = noise(B, T).requires_grad_()
    scores = noise(B)

    def logprobs(given: torch.Tensor) -> torch.Tensor:
        return given.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

    with torch.no_grad():
        old = logprobs(logits + 0.3 * noise(B, T, V))
        base = logprobs(logits + 0.5 * noise(B, T, V))
        old_values = values + 0.3 * noise(B, T)
    rewards, _, _ = PPOTrainer.compute_rewards(trainer, scores, old, base, mask)
    kept, advantages, returns = PPOTrainer.compute_advantages(trainer, old_values, rewards, mask)
    policy, value, stats = PPOTrainer.loss(
        trainer, old, kept, logits, values, logprobs(logits), mask, advantages, returns
    )
    (policy + value).backward()
    document = {
        "made_by": {name: version(name) for name in ("trl", "torch", "transformers")},
        "command": "python tests/agreement/trl_ppo_reference.py",
        "settings": {**SETTINGS, "kl_coef": KL_COEF},
        "mask": mask.tolist(),
        "tokens": tokens.tolist(),
        "scores": scores.tolist(),
        "logits": logits.tolist(),
        "values": values.tolist(),
        "old": old.tolist(),
        "base": base.tolist(),
        "old_values": old_values.tolist(),
        "rewards": rewards.tolist(),
        "advantages": advantages.tolist(),
        "returns": returns.tolist(),
        "entropy": stats["policy/entropy"].item(),
        "policy_loss": policy.item(),
        "value_loss": value.item(),
        "gradient": {"logits": logits.grad.tolist(), "values": values.grad.tolist()},
    }
    OUT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
