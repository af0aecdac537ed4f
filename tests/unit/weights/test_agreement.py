"""Our objectives against the losses and gradients of TRL's trainers, to 1e-5.

The numbers in `tests/agreement/*.json` say which versions made them and with which command.
"""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from sia.weights import objectives as o  # noqa: E402
from sia.weights.policy import Scores  # noqa: E402
from sia.weights.recipes import Dpo, Grpo, Ppo, Recipe, Reinforce, Round, Sft, StepBatch  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "agreement"
TRL: dict[str, Any] = json.loads((FOLDER / "trl.json").read_text())
PPO: dict[str, Any] = json.loads((FOLDER / "trl_ppo.json").read_text())
PADDED = [answer + [0] * (TRL["longest"] - len(answer)) for answer in TRL["answers"]]
ANSWERS = torch.tensor(PADDED)
MASK = torch.tensor(
    [[1.0] * len(answer) + [0.0] * (TRL["longest"] - len(answer)) for answer in TRL["answers"]]
)
GROUPS = torch.arange(len(PADDED)) // TRL["group"]
REWARDS = torch.tensor(TRL["rewards"])

Model = dict[str, "torch.Tensor"]


def model(weights: dict[str, list], *, trained: bool = False) -> Model:
    return {name: torch.tensor(w).requires_grad_(trained) for name, w in weights.items()}


def logprobs(model: Model, answers: "torch.Tensor", prompts: "torch.Tensor") -> "torch.Tensor":
    """Of the model without layers: the next token depends on the last one only."""
    before = torch.cat([prompts[:, None], answers[:, :-1]], 1)
    hidden = model["embedding"][before]
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * model["norm"]
    return (hidden @ model["head"].T).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)


LAST = torch.tensor([TRL["prompts"][group][-1] for group in GROUPS.tolist()])


def close(ours: "torch.Tensor", theirs: Any) -> None:
    assert torch.allclose(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-5)


def agree(case: dict[str, Any], trained: Model, loss: "torch.Tensor") -> None:
    loss.backward()
    close(loss.detach(), case["loss"])
    for name, gradient in case["gradient"].items():
        found = trained[name].grad
        assert found is not None
        close(found, gradient)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("grpo", Grpo(average="sequence", kl_coef=0.1)),
        ("grpo plain kl", Grpo(average="sequence", kl_coef=0.1, kl_estimator="k3")),
        ("grpo batch scale", Grpo(average="sequence", scale="batch")),
        ("dr_grpo", Grpo(average="constant", scale="none")),
        ("dapo", Grpo(average="token", clip_high=0.28)),
    ],
)
def test_grpo_and_its_variants_agree_with_trl(name: str, recipe: Grpo) -> None:
    case = TRL["cases"][name]
    start, trained = model(case["start"]), model(case["weights"], trained=True)
    advantages = o.group_advantages(
        REWARDS, GROUPS, baseline=recipe.baseline, scale=recipe.scale
    ).values_B
    close(advantages, case["advantages"])
    old = logprobs(start, ANSWERS, LAST)
    batch = StepBatch(
        weights_BT=o.token_weights(MASK, average=recipe.average, length=TRL["longest"]),
        share=1 / len(PADDED), advantages_BT=advantages[:, None], old_BT=old, base_BT=old,
    )  # fmt: skip
    agree(case, trained, recipe.loss(Scores(logprobs_BT=logprobs(trained, ANSWERS, LAST)), batch))


def test_rloo_agrees_with_trl() -> None:
    """TRL takes the ratio of whole answers: one token of ours is one answer of theirs."""
    case = TRL["cases"]["rloo"]
    start, trained = model(case["start"]), model(case["weights"], trained=True)
    answers = Round(
        mask_BT=MASK, rewards_B=REWARDS, groups_B=GROUPS, token_rewards_BT=torch.zeros_like(MASK)
    )
    credit = Reinforce(kl_coef=0).credit(answers)
    advantages = torch.zeros(len(PADDED)).index_copy(
        0, credit.rows_R, credit.advantages_RT.flatten()
    )
    close(advantages, case["advantages"])
    loss = o.clipped_loss(
        (logprobs(trained, ANSWERS, LAST) * MASK).sum(1, keepdim=True),
        (logprobs(start, ANSWERS, LAST) * MASK).sum(1, keepdim=True),
        advantages[:, None],
        torch.full((len(PADDED), 1), 1 / len(PADDED)),
        clip_low=0.2,
        clip_high=0.2,
    )
    agree(case, trained, loss)


def test_dpo_agrees_with_trl() -> None:
    case = TRL["cases"]["dpo"]
    start, trained = model(case["start"]), model(case["weights"], trained=True)
    order = [row for _, *pair in case["pairs"] for row in (TRL["answers"].index(a) for a in pair)]
    tokens, mask, last = ANSWERS[order], MASK[order], LAST[order]
    batch = StepBatch(
        weights_BT=o.token_weights(mask, average="token"), share=1 / len(order),
        advantages_BT=torch.ones(len(order), 1), base_BT=logprobs(start, tokens, last),
    )  # fmt: skip
    loss = Dpo(beta=case["options"]["beta"]).loss(
        Scores(logprobs_BT=logprobs(trained, tokens, last)), batch
    )
    agree(case, trained, loss)


def test_sft_agrees_with_trl() -> None:
    case = TRL["cases"]["sft"]
    trained = model(case["weights"], trained=True)
    recipe: Recipe = Sft()
    batch = StepBatch(
        weights_BT=o.token_weights(MASK, average=recipe.average), share=1 / len(PADDED),
        advantages_BT=torch.ones(len(PADDED), 1),
    )  # fmt: skip
    agree(case, trained, recipe.loss(Scores(logprobs_BT=logprobs(trained, ANSWERS, LAST)), batch))


def test_ppo_agrees_with_trl() -> None:
    settings = PPO["settings"]
    mask, tokens = torch.tensor(PPO["mask"]).float(), torch.tensor(PPO["tokens"])
    old, base, old_values = (torch.tensor(PPO[key]) for key in ("old", "base", "old_values"))
    recipe = Ppo(
        gamma=settings["gamma"], lam=settings["lam"], clip_low=settings["cliprange"],
        clip_high=settings["cliprange"], value_clip=settings["cliprange_value"],
        value_coef=settings["vf_coef"], kl_coef=settings["kl_coef"], kl_estimator="k1",
    )  # fmt: skip
    last = mask.sum(1, keepdim=True).long() - 1
    scores = torch.tensor(PPO["scores"])
    paid = torch.zeros_like(mask).scatter(1, last, scores[:, None])
    credit = recipe.credit(
        Round(
            mask_BT=mask, rewards_B=scores, groups_B=torch.arange(len(mask)),
            token_rewards_BT=paid, logprobs_BT=old, base_BT=base, values_BT=old_values,
        )
    )  # fmt: skip
    close(credit.advantages_RT, (torch.tensor(PPO["advantages"]) * mask).tolist())
    assert credit.targets_RT is not None
    close(credit.targets_RT, (torch.tensor(PPO["returns"]) * mask).tolist())

    logits = torch.tensor(PPO["logits"]).requires_grad_()
    values = torch.tensor(PPO["values"]).requires_grad_()
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    weights = o.token_weights(mask, average="token")
    close(o.entropy_bonus(entropy.detach(), weights), PPO["entropy"])
    batch = StepBatch(
        weights_BT=weights, share=1 / len(mask), advantages_BT=credit.advantages_RT, old_BT=old,
        base_BT=base, old_values_BT=old_values, targets_BT=credit.targets_RT,
    )  # fmt: skip
    scored = Scores(logprobs_BT=logp.gather(-1, tokens[..., None]).squeeze(-1), values_BT=values)
    loss = recipe.loss(scored, batch)
    loss.backward()
    close(loss.detach(), PPO["policy_loss"] + PPO["value_loss"])
    assert logits.grad is not None
    assert values.grad is not None
    close(logits.grad, PPO["gradient"]["logits"])
    close(values.grad, PPO["gradient"]["values"])
