"""Recipes: what they credit, that parts of a step add up, and how a mistake is answered."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sia.errors import WeightsError
from sia.weights import recipes
from sia.weights.recipes import RECIPES, recipe

CONF = Path(__file__).resolve().parents[3] / "conf" / "weights"


def test_the_menu_is_cheap_to_read() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from sia.weights.recipes import recipe;"
         "recipe({'name': 'grpo'}); print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_its_name_and_keeps_what_it_is_given(name: str) -> None:
    made = recipe({"name": name, "steps": 7, "lr": 0.5})
    assert (made.name, made.steps, made.lr) == (name, 7, 0.5)
    assert dataclasses.replace(made, steps=50, lr=RECIPES[name](name=name).lr) == RECIPES[name](
        name=name
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_option_says_when_the_recipe_is_to_be_chosen(name: str) -> None:
    comments = [
        line[2:] for line in (CONF / f"{name}.yaml").read_text().splitlines() if line[:2] == "# "
    ]
    assert recipes.menu()[name]["when"] in " ".join(comments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gropo"}, "There is no recipe 'gropo'. Did you mean 'grpo'? Recipes: sft,"),
        ({}, "There is no recipe None."),
        ({"name": "grpo", "clip_hihg": 1}, "no setting 'clip_hihg'. Did you mean 'clip_high'?"),
        ({"name": "sft", "group": 4}, "recipe 'sft' has no setting 'group'"),
        ({"name": "grpo", "steps": 0, "scale": "max"}, "steps=0 must be at least 1. scale='max'"),
        ({"name": "grpo", "lr": 0}, "lr=0 must be more than 0"),
        ({"name": "sft", "head_lr": 0}, "head_lr=0 must be more than 0"),
        ({"name": "grpo", "kl_coef": math.nan}, "kl_coef=nan must be at least 0"),
        ({"name": "ppo", "gamma": 1.5}, "gamma=1.5 must be at most 1"),
        ({"name": "dpo", "batch": 3}, "batch=3 must be a multiple of 2"),
        ({"name": "grpo", "group": 1}, "group=1 must be at least 2"),
        ({"name": "grpo", "steps": "many"}, "wrong type"),
    ],
)
def test_a_wrong_setting_is_one_message(settings: dict, message: str) -> None:
    with pytest.raises(WeightsError) as error:
        recipe(settings)
    assert message in str(error.value)


# With tensors

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from sia.weights import objectives as o  # noqa: E402
from sia.weights.policy import Scores  # noqa: E402

B, T = 8, 4
RANDOM = torch.Generator().manual_seed(0)


def random(*shape: int) -> "torch.Tensor":
    return torch.randn(*shape, dtype=torch.float64, generator=RANDOM)


MASK = (torch.arange(T) < torch.tensor([4, 1, 3, 2, 4, 4, 2, 1])[:, None]).double()
REWARDS = torch.tensor([1, 0, 0, 0.5, 2, 2, 2, 2], dtype=torch.float64)
GROUPS = torch.tensor([0] * 4 + [1] * 4)
LOGPROBS, BASE, VALUES = -random(B, T).abs() * MASK, -random(B, T).abs() * MASK, random(B, T) * MASK
TOKEN_REWARDS = torch.zeros(B, T, dtype=torch.float64).scatter(
    1, MASK.sum(1, keepdim=True).long() - 1, REWARDS[:, None]
)
ANSWERS = recipes.Round(
    mask_BT=MASK, rewards_B=REWARDS, groups_B=GROUPS, token_rewards_BT=TOKEN_REWARDS,
    logprobs_BT=LOGPROBS, base_BT=BASE, values_BT=VALUES,
)  # fmt: skip


def rows(credit: recipes.Credit) -> list[int]:
    return credit.rows_R.tolist()


def test_groups_without_a_signal_are_dropped_by_the_recipes_that_compare() -> None:
    for name in ("reinforce", "grpo", "entropic"):
        assert rows(recipe({"name": name}).credit(ANSWERS)) == [0, 1, 2, 3]
    assert rows(recipe({"name": "best_of_n", "top_k": 2}).credit(ANSWERS)) == [0, 3]
    assert rows(recipe({"name": "dpo"}).credit(ANSWERS)) == [0, 1]
    assert rows(recipe({"name": "sft"}).credit(ANSWERS)) == list(range(B))
    assert rows(recipe({"name": "ppo"}).credit(ANSWERS)) == list(range(B))


def test_options_reach_the_advantages() -> None:
    dr = recipe({"name": "grpo", "scale": "none"}).credit(ANSWERS).advantages_RT.flatten()
    assert torch.allclose(dr, REWARDS[:4] - REWARDS[:4].mean())
    rloo = recipe({"name": "reinforce", "kl_coef": 0}).credit(ANSWERS).advantages_RT.flatten()
    assert torch.allclose(rloo, (REWARDS[:4] - REWARDS[:4].mean()) * 4 / 3)


def test_a_divergence_that_is_charged_lowers_the_reward_of_the_answer() -> None:
    charged = recipe(
        {"name": "grpo", "kl_coef": 0.5, "kl_estimator": "k1", "scale": "none"}
    ).credit(ANSWERS)
    assert rows(charged) == list(range(B))  # equal rewards, but not equally far from the base
    paid = REWARDS - 0.5 * ((LOGPROBS - BASE) * MASK).sum(1)
    assert torch.allclose(charged.advantages_RT.flatten(), paid - o.group_mean(paid, GROUPS))


def test_ppo_credits_tokens_with_charged_divergence() -> None:
    made = recipe({"name": "ppo", "kl_coef": 0.5, "kl_estimator": "k1", "whiten": False})
    paid = TOKEN_REWARDS - 0.5 * (LOGPROBS - BASE) * MASK
    expected = o.gae(paid, VALUES, MASK, gamma=1.0, lam=0.95)
    found = made.credit(ANSWERS)
    assert torch.allclose(found.advantages_RT, expected.values_BT)
    assert found.targets_RT is not None
    assert torch.allclose(found.targets_RT, expected.targets_BT)


VARIANTS: list[dict] = [
    *({"name": name} for name in RECIPES),
    {"name": "grpo", "kl_coef": 0.1},
    {"name": "grpo", "average": "token", "clip_high": 0.28},
    {"name": "reinforce", "average": "sequence"},
    {"name": "ppo", "entropy_coef": 0.1, "kl_coef": 0.1, "kl_estimator": "k3", "value_clip": None},
    {"name": "dpo", "kl_coef": 0.1},
    {"name": "best_of_n", "kl_coef": 0.1, "top_k": 3},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_parts_of_a_step_add_up_to_the_step(settings: dict) -> None:
    """Whatever the micro-batch: neither the loss nor its gradient changes."""
    made = recipe(settings)
    credit = made.credit(ANSWERS)
    R = len(credit.rows_R)
    weights = o.token_weights(MASK[credit.rows_R], average=made.average)

    def batch(part: slice) -> recipes.StepBatch:
        index = credit.rows_R[part]
        return recipes.StepBatch(
            weights_BT=weights[part],
            share=1 / R,
            advantages_BT=credit.advantages_RT[part],
            old_BT=LOGPROBS[index],
            base_BT=BASE[index],
            old_values_BT=VALUES[index],
            targets_BT=None if credit.targets_RT is None else credit.targets_RT[part],
        )

    def scores(x: "torch.Tensor", part: slice) -> Scores:
        index = credit.rows_R[part]
        return Scores(logprobs_BT=x[index], entropy_BT=x[index] ** 2, values_BT=x[index] * 0.3)

    found = []
    for size in (R, made.unit):
        x = (LOGPROBS + 0.1).requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, R, size):
            part = slice(start, start + size)
            loss = made.loss(scores(x, part), batch(part))
            loss.backward()
            total = total + loss.detach()
        found.append((total, x.grad))
    assert found[0][0].item() == pytest.approx(found[1][0].item())
    assert torch.allclose(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


def test_the_first_step_after_sampling_needs_no_old_log_probabilities() -> None:
    made = recipe({"name": "grpo"})
    weights = o.token_weights(MASK, average="sequence")
    gradients = []
    for old in (None, LOGPROBS):
        x = LOGPROBS.clone().requires_grad_()
        batch = recipes.StepBatch(
            weights_BT=weights, share=1 / B, advantages_BT=REWARDS[:, None], old_BT=old
        )
        made.loss(Scores(logprobs_BT=x), batch).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
