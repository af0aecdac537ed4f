"""Each algorithm against numbers worked out by hand, finite differences, and its own laws."""

import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")
from hypothesis import assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sia.weights import objectives as o  # noqa: E402

unhurried = settings(deadline=None, max_examples=40)
LN2 = math.log(2)


def t(*values: object) -> "torch.Tensor":
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def ids(*values: int) -> "torch.Tensor":
    return torch.tensor(values)


MASK = t([1, 1, 1], [1, 0, 0])  # an answer of three tokens, and one of one


# How tokens are weighed


def test_token_average_weighs_all_tokens_of_a_step_alike() -> None:
    assert o.token_weights(MASK, average="token").tolist() == [[1 / 4] * 3, [1 / 4, 0, 0]]


def test_sequence_average_weighs_all_answers_alike() -> None:
    # two answers: half a unit each; three tokens share one half
    assert torch.allclose(
        o.token_weights(MASK, average="sequence"), t([1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0])
    )


def test_constant_average_does_not_look_at_the_length_of_an_answer() -> None:
    # 1 / (2 answers * 5 tokens at most)
    found = o.token_weights(MASK, average="constant", length=5)
    assert torch.allclose(found, t([0.1, 0.1, 0.1], [0.1, 0, 0]))


def test_an_unknown_average_is_refused() -> None:
    with pytest.raises(ValueError, match="average='mean'"):
        o.token_weights(MASK, average="mean")
    with pytest.raises(ValueError, match="length=None"):
        o.token_weights(MASK, average="constant")


# Advantages by hand


def test_grpo_advantages_by_hand() -> None:
    # rewards 1, 0, 0, 1: mean 1/2, deviations +-1/2, variance (4 * 1/4) / 3, std 1 / sqrt(3)
    found = o.group_advantages(t(1, 0, 0, 1), ids(7, 7, 7, 7), eps=0)
    a = 0.5 * math.sqrt(3)
    assert torch.allclose(found.values_B, t(a, -a, -a, a))
    assert found.signal_B.all()


def test_dr_grpo_advantages_are_the_bare_deviations() -> None:
    found = o.group_advantages(t(3, 0, 0), ids(0, 0, 0), scale="none")
    assert torch.allclose(found.values_B, t(2, -1, -1))


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    # 3 - (0 + 1)/2 = 2.5; 0 - (3 + 1)/2 = -2; 1 - (3 + 0)/2 = -0.5
    found = o.group_advantages(t(3, 0, 1), ids(0, 0, 0), baseline="leave_one_out", scale="none")
    assert torch.allclose(found.values_B, t(2.5, -2, -0.5))


def test_a_batch_baseline_compares_answers_to_different_items() -> None:
    found = o.group_advantages(t(3, 0, 0), ids(0, 1, 2), baseline="batch", scale="none")
    assert torch.allclose(found.values_B, t(2, -1, -1))


def test_groups_do_not_mix_and_may_lie_anywhere() -> None:
    found = o.group_advantages(t(1, 10, 3, 20), ids(5, 2, 5, 2), scale="none")
    assert torch.allclose(found.values_B, t(-1, -5, 1, 5))


def test_scale_batch_divides_by_the_spread_of_all_rewards() -> None:
    # deviations from the group means are +-1 and +-2; all rewards: 0 2 0 4, mean 1.5,
    # squares 2.25 + 0.25 + 2.25 + 6.25 = 11, variance 11/3
    found = o.group_advantages(t(0, 2, 0, 4), ids(0, 0, 1, 1), scale="batch", eps=0)
    assert torch.allclose(found.values_B, t(-1, 1, -2, 2) / math.sqrt(11 / 3))


def test_equal_rewards_carry_no_signal_and_are_counted() -> None:
    found = o.group_advantages(t(1, 1, 0, 1, 5), ids(0, 0, 1, 1, 2))
    assert found.signal_B.tolist() == [False, False, True, True, False]
    assert found.values_B[[0, 1, 4]].tolist() == [0, 0, 0]


def test_unknown_options_of_advantages_are_refused() -> None:
    with pytest.raises(ValueError, match="baseline='median'"):
        o.group_advantages(t(1, 0), ids(0, 0), baseline="median")


def test_entropic_weights_by_hand() -> None:
    # One success among four: weights p, and (1-p)/3 for the others. KL to uniform is
    # ln 4 - H(p) - (1-p) ln 3 = ln 2; solved independently below.
    def kl(p: float) -> float:
        return math.log(4) + p * math.log(p) + (1 - p) * math.log((1 - p) / 3)

    low, high = 0.25, 1.0 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < LN2 else (low, middle)
    found = o.entropic_weights(t(0, 0, 9, 0), ids(0, 0, 0, 0))
    rest = (1 - low) / 3
    assert torch.allclose(found, t(rest, rest, low, rest))
    advantages = o.entropic_advantages(t(0, 0, 9, 0), ids(0, 0, 0, 0), cap=100).values_B
    # leave-one-out: the success against the mean of the rest; a failure against all the others
    others = (low + 2 * rest) / 3
    expected = t(rest / others - 1, rest / others - 1, low / rest - 1, rest / others - 1)
    assert torch.allclose(advantages, expected)
    assert advantages[0] < 0


def test_entropic_weights_that_cannot_reach_the_target_are_the_limit() -> None:
    # two of three are best: at most ln(3/2) < ln 2 away from uniform
    assert o.entropic_weights(t(1, 0, 1), ids(0, 0, 0)).tolist() == [0.5, 0, 0.5]
    # a pair reaches ln 2 only in the limit
    assert o.entropic_weights(t(1, 0), ids(0, 0)).tolist() == [1, 0]
    assert o.entropic_advantages(t(1, 0), ids(0, 0), cap=10).values_B.tolist() == [10, -1]


def test_rewards_that_differ_by_rounding_are_ties() -> None:
    weights = o.entropic_weights(t(0.1 + 0.2, 0.3, 0), ids(0, 0, 0))
    assert weights.tolist() == [0.5, 0.5, 0]


def test_entropic_weights_of_equal_rewards_are_uniform_without_a_signal() -> None:
    assert o.entropic_weights(t(2, 2, 2), ids(0, 0, 0)).tolist() == [1 / 3] * 3
    found = o.entropic_advantages(t(2, 2, 2), ids(0, 0, 0))
    assert found.values_B.tolist() == [0, 0, 0]
    assert not found.signal_B.any()


def test_the_best_answers_of_each_group_are_chosen_ties_by_order() -> None:
    rewards, groups = t(1, 3, 3, 0, 5, 5), ids(0, 0, 0, 0, 1, 1)
    chosen = o.best_of_group(rewards, groups, top_k=1)
    assert chosen.tolist() == [False, True, False, False, False, False]
    chosen = o.best_of_group(rewards, groups, top_k=2)
    assert chosen.tolist() == [False, True, True, False, False, False]


def test_pairs_are_the_best_and_the_worst_of_groups_with_a_signal() -> None:
    found = o.best_and_worst(t(1, 0, 2, 4, 4, 0, 0), ids(3, 3, 3, 1, 1, 2, 2))
    assert (found.chosen_P.tolist(), found.rejected_P.tolist()) == ([2], [1])
    nothing = o.best_and_worst(t(1, 1), ids(0, 0))
    assert nothing.chosen_P.tolist() == nothing.rejected_P.tolist() == []


def test_gae_by_hand() -> None:
    # rewards 0 0 1, values 0.5 0.6 0.8, gamma 0.9, lambda 0.5
    # delta_2 = 1 - 0.8 = 0.2; delta_1 = 0.9*0.8 - 0.6 = 0.12; delta_0 = 0.9*0.6 - 0.5 = 0.04
    # A_2 = 0.2; A_1 = 0.12 + 0.45*0.2 = 0.21; A_0 = 0.04 + 0.45*0.21 = 0.1345
    # the second answer is one token long: A = 2 - 0.3
    found = o.gae(
        t([0, 0, 1], [2, 9, 9]), t([0.5, 0.6, 0.8], [0.3, 7, 7]), MASK, gamma=0.9, lam=0.5
    )
    assert torch.allclose(found.values_BT, t([0.1345, 0.21, 0.2], [1.7, 0, 0]))
    assert torch.allclose(found.targets_BT, t([0.6345, 0.81, 1.0], [2.0, 0, 0]))


def test_gae_with_lambda_one_is_return_less_value() -> None:
    rewards, values = t([1, 2, 3], [4, 0, 0]), t([0.1, 0.2, 0.3], [0.4, 0, 0])
    found = o.gae(rewards, values, MASK, gamma=1, lam=1)
    assert torch.allclose(found.values_BT, (t([6, 5, 3], [4, 0, 0]) - values) * MASK)


def test_whitening_by_hand() -> None:
    # four tokens count: 1 2 3 6, mean 3, variance (4 + 1 + 0 + 9) / 3
    found = o.whiten(t([1, 2, 3], [6, 99, 99]), MASK, eps=0)
    assert torch.allclose(found, t([-2, -1, 0], [3, 0, 0]) / math.sqrt(14 / 3))


# Losses by hand

W = t([0.1, 0.2, 0.3], [0.4, 0, 0])


def test_cross_entropy_by_hand() -> None:
    # 0.1*1 + 0.2*2 + 0.3*3 + 0.4*4
    found = o.cross_entropy_loss(-t([1, 2, 3], [4, 50, 50]), W)
    assert found.item() == pytest.approx(3.0)


def test_reinforce_by_hand() -> None:
    # -(2 * (0.1*-1 + 0.2*-2 + 0.3*-3) + -1 * 0.4*-4) = 2.8 - 1.6
    found = o.reinforce_loss(-t([1, 2, 3], [4, 5, 5]), t([2], [-1]), W)
    assert found.item() == pytest.approx(1.2)


def test_the_clipped_surrogate_by_hand() -> None:
    # ratios 1.5 0.5 1 | 0.5, advantages 2 and -1, limits 0.8 and 1.3
    # A = 2: min(3, 2.6), min(1, 1.6), 2 -> 2.6, 1, 2; A = -1: min(-0.5, -0.8) = -0.8
    ratio = t([1.5, 0.5, 1.0], [0.5, 1, 1])
    found = o.clipped_loss(
        ratio.log(), torch.zeros_like(ratio), t([2], [-1]), W, clip_low=0.2, clip_high=0.3
    )
    assert found.item() == pytest.approx(-(0.1 * 2.6 + 0.2 * 1 + 0.3 * 2 + 0.4 * -0.8))


def test_kl_estimates_by_hand() -> None:
    # policy 1/2, base 1/4: k1 = ln 2; k3 = 1/2 - 1 + ln 2
    p, q = t(0.5).log(), t(0.25).log()
    assert o.kl_to_base(p, q, estimator="k1").item() == pytest.approx(LN2)
    assert o.kl_to_base(p, q, estimator="k3").item() == pytest.approx(LN2 - 0.5)
    with pytest.raises(ValueError, match="estimator='k2'"):
        o.kl_to_base(p, q, estimator="k2")


def test_both_kl_estimates_have_the_divergence_as_their_mean() -> None:
    p, q = t(0.7, 0.2, 0.1), t(0.3, 0.3, 0.4)
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        estimate = (p * o.kl_to_base(p.log(), q.log(), estimator=estimator)).sum()
        assert estimate.item() == pytest.approx(exact.item())


def test_the_weighted_estimate_has_the_gradient_of_the_divergence_and_k1_none() -> None:
    """Why `k1` is charged to the reward, and why `k3` is weighted by the ratio."""
    q = t(0.3, 0.3, 0.4).log()
    logits = t(0.7, 0.2, 0.1).log()

    def gradient(loss: Callable) -> "torch.Tensor":
        x = logits.clone().requires_grad_()
        loss(x.log_softmax(0)).backward()
        assert x.grad is not None
        return x.grad

    def expected(estimate: Callable) -> Callable:
        return lambda logp: (logp.exp().detach() * estimate(logp)).sum()

    exact = gradient(lambda logp: (logp.exp() * (logp - q)).sum())
    k1 = gradient(expected(lambda logp: o.kl_to_base(logp, q, estimator="k1")))
    k3 = gradient(expected(lambda logp: o.kl_to_base(logp, q, estimator="k3")))
    weighted = gradient(lambda logp: o.kl_loss(logp, q, logp.exp().detach(), old_BT=logp.detach()))
    assert torch.allclose(weighted, exact)
    assert torch.allclose(k1, torch.zeros_like(k1))
    assert not torch.allclose(k3, exact, atol=1e-2)
    assert (k3 * exact).sum() > 0


def test_the_value_loss_by_hand() -> None:
    # values 1.0, old 0.5, target 2, clip 0.2: errors 1 and (0.7 - 2)^2 = 1.69 -> half of 1.69
    one = t([[1.0]])
    found = o.value_loss(one, one * 0.5, one * 2, one, clip=0.2)
    assert found.item() == pytest.approx(0.845)
    assert o.value_loss(one, one * 0.5, one * 2, one, clip=None).item() == pytest.approx(0.5)


def test_dpo_by_hand() -> None:
    # margin (-1 - -2) - (-3 - -2.5) = 1.5; beta 2: -ln sigmoid(3)
    found = o.dpo_losses(t([-1]), t([-3]), t([-2]), t([-2.5]), beta=2)
    assert found.item() == pytest.approx(math.log1p(math.exp(-3)))
    even = o.dpo_losses(t([-1]), t([-3]), t([-1]), t([-3]), beta=0.1)
    assert even.item() == pytest.approx(LN2)


# Gradients by finite differences, from the logits down

LOGITS = torch.linspace(-2, 2, 2 * 3 * 4, dtype=torch.float64).sin().reshape(2, 3, 4)
TOKENS = torch.tensor([[0, 3, 1], [2, 0, 0]])


def logprobs(logits: "torch.Tensor") -> "torch.Tensor":
    return logits.log_softmax(-1).gather(-1, TOKENS[..., None]).squeeze(-1)


def values(logits: "torch.Tensor") -> "torch.Tensor":
    return logits[..., 0] * 2


def entropy(logits: "torch.Tensor") -> "torch.Tensor":
    return torch.distributions.Categorical(logits=logits).entropy()


OLD = logprobs(LOGITS) + t([0.3, -0.05, -0.4], [0.1, 0, 0])
A = t([1.5, -0.5, 1.0], [-2, 0, 0])
OBJECTIVES: dict[str, Callable[["torch.Tensor"], "torch.Tensor"]] = {
    "cross entropy": lambda x: o.cross_entropy_loss(logprobs(x), W),
    "reinforce": lambda x: o.reinforce_loss(logprobs(x), A, W),
    "clipped": lambda x: o.clipped_loss(logprobs(x), OLD, A, W, clip_low=0.2, clip_high=0.28),
    "kl": lambda x: o.kl_loss(logprobs(x), OLD, W),
    "weighted kl": lambda x: o.kl_loss(logprobs(x), OLD, W, old_BT=OLD * 1.1),
    "value": lambda x: o.value_loss(values(x), values(LOGITS) - 0.3, A, W, clip=0.2),
    "entropy": lambda x: o.entropy_bonus(entropy(x), W),
    "dpo": lambda x: o.dpo_losses(
        (logprobs(x) * MASK).sum(1)[:1],
        (logprobs(x) * MASK).sum(1)[1:],
        (OLD * MASK).sum(1)[:1],
        (OLD * MASK).sum(1)[1:],
        beta=0.7,
    ).sum(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    loss = OBJECTIVES[name]
    x = LOGITS.clone().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 1e-3
    step = 1e-6
    for index in range(LOGITS.numel()):
        shift = torch.zeros_like(LOGITS)
        shift.view(-1)[index] = step
        slope = (loss(LOGITS + shift) - loss(LOGITS - shift)) / (2 * step)
        assert x.grad.view(-1)[index].item() == pytest.approx(slope.item(), abs=1e-7)


# Laws

finite = st.floats(-100, 100, allow_nan=False, width=32)


@st.composite
def grouped(draw: st.DrawFn) -> tuple["torch.Tensor", "torch.Tensor"]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    rewards = draw(st.lists(finite, min_size=len(groups), max_size=len(groups)))
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)


WAYS = [(baseline, scale) for baseline in ("mean", "leave_one_out") for scale in ("group", "none")]


@pytest.mark.parametrize(("baseline", "scale"), WAYS)
@unhurried
@given(data=grouped(), shift=finite)
def test_a_shift_of_a_whole_group_changes_no_advantage(
    baseline: str, scale: str, data: tuple, shift: float
) -> None:
    rewards, groups = data
    rewards = rewards.round(decimals=3)
    kind = {"baseline": baseline, "scale": scale}
    before = o.group_advantages(rewards, groups, **kind)
    after = o.group_advantages(rewards + round(shift, 3) * (groups + 1), groups, **kind)
    differ = o.group_mean((rewards - o.group_mean(rewards, groups)) ** 2, groups) > 1e-8
    assert torch.allclose(before.values_B[differ], after.values_B[differ], atol=1e-6)


@unhurried
@given(data=grouped())
def test_advantages_of_a_group_add_up_to_nothing(data: tuple) -> None:
    rewards, groups = data
    for baseline, scale in WAYS:
        found = o.group_advantages(rewards, groups, baseline=baseline, scale=scale)
        assert o.group_mean(found.values_B, groups).abs().max() < 1e-7


@unhurried
@given(reward=finite, size=st.integers(1, 8))
def test_equal_rewards_never_carry_a_signal(reward: float, size: int) -> None:
    rewards, groups = torch.full((size,), reward), torch.zeros(size, dtype=torch.long)
    for made in (
        o.group_advantages(rewards, groups),
        o.group_advantages(rewards, groups, baseline="leave_one_out", scale="none"),
        o.entropic_advantages(rewards, groups),
    ):
        assert not made.signal_B.any()
        assert not made.values_B.any()
    assert not o.best_of_group(rewards, groups, top_k=1).any()
    assert len(o.best_and_worst(rewards, groups).chosen_P) == 0


@unhurried
@given(data=grouped(), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_entropic_weights_are_ln_2_from_uniform_wherever_they_can_be(
    data: tuple, scale: float
) -> None:
    rewards, groups = data[0].round(decimals=4), data[1]
    weights = o.entropic_weights(rewards * scale, groups)
    for group in groups.unique():
        inside = weights[groups == group]
        ours = (rewards * scale)[groups == group]
        assert inside.sum().item() == pytest.approx(1)
        kl = torch.xlogy(inside, inside * len(inside)).sum().item()
        best = (ours == ours.max()).sum().item()
        reach = math.log(len(inside) / best)
        assert kl == pytest.approx(min(LN2, reach), abs=1e-6)
        order = ours.argsort()
        assert (inside[order].diff() >= -1e-12).all()  # a better answer never weighs less


@unhurried
@given(data=grouped(), factor=st.floats(0.01, 100), shift=finite)
def test_entropic_advantages_do_not_depend_on_the_units_of_the_reward(
    data: tuple, factor: float, shift: float
) -> None:
    rewards, groups = data
    rewards = rewards.round(decimals=1)
    before = o.entropic_advantages(rewards, groups).values_B
    after = o.entropic_advantages(rewards * factor + round(shift, 1), groups).values_B
    near_ties = torch.cdist(rewards[:, None], rewards[:, None])
    assume(not ((near_ties > 0) & (near_ties < 0.05)).any())
    assert torch.allclose(before, after, atol=1e-4)


@unhurried
@given(data=grouped(), seed=st.integers(0, 2**16))
def test_the_order_of_the_answers_does_not_matter(data: tuple, seed: int) -> None:
    rewards, groups = data
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    for make in (
        lambda r, g: o.group_advantages(r, g).values_B,
        lambda r, g: o.group_advantages(r, g, baseline="leave_one_out", scale="batch").values_B,
        lambda r, g: o.entropic_advantages(r, g).values_B,
    ):
        if len(rewards) > 1:
            assert torch.allclose(
                make(rewards, groups)[order], make(rewards[order], groups[order]), atol=1e-8
            )


@unhurried
@given(
    ratio=st.floats(0.05, 20), advantage=finite.filter(lambda a: abs(a) > 1e-3),
    low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5),
)  # fmt: skip
def test_a_token_beyond_its_limit_pulls_no_further(
    ratio: float, advantage: float, low: float, high: float
) -> None:
    assume(min(abs(ratio - 1 + low), abs(ratio - 1 - high)) > 1e-6)
    x = t([[math.log(ratio)]]).requires_grad_()
    one = t([[1.0]])
    loss = o.clipped_loss(x, one * 0, one * advantage, one, clip_low=low, clip_high=high)
    loss.backward()
    beyond = ratio > 1 + high if advantage > 0 else ratio < 1 - low
    limit = 1 + high if advantage > 0 else 1 - low
    assert x.grad is not None
    assert (x.grad.item() == 0) == beyond
    assert loss.item() == pytest.approx(-advantage * (limit if beyond else ratio))


@unhurried
@given(noise=st.floats(-1e6, 1e6), seed=st.integers(0, 2**16))
def test_what_stands_on_the_padding_reaches_neither_loss_nor_gradient(
    noise: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, 3, dtype=torch.float64, generator=random) for _ in range(4)]
    spoilt = [torch.where(MASK > 0, part, noise) for part in parts]
    weights = o.token_weights(MASK, average="sequence")
    losses: list[Callable] = [
        lambda a, b, c, d: o.cross_entropy_loss(a, weights),
        lambda a, b, c, d: o.reinforce_loss(a, c, weights),
        lambda a, b, c, d: o.clipped_loss(a, b, c, weights, clip_low=0.2, clip_high=0.2),
        lambda a, b, c, d: o.kl_loss(a, b, weights),
        lambda a, b, c, d: o.value_loss(a, b, d, weights, clip=0.2),
        lambda a, b, c, d: o.value_loss(a, b, d, weights, clip=None),
        lambda a, b, c, d: o.entropy_bonus(a, weights),
    ]
    for loss in losses:
        found = []
        for made in (parts, spoilt):
            x = made[0].clone().requires_grad_()
            value = loss(x, *made[1:])
            value.backward()
            found.append((value, x.grad))
        assert found[0][0].item() == found[1][0].item()
        assert torch.equal(found[0][1], found[1][1])
        assert not found[0][1][MASK == 0].any()
    for made in (
        lambda p: o.gae(p[0], p[1], MASK, gamma=0.9, lam=0.8).values_BT,
        lambda p: o.gae(p[0], p[1], MASK, gamma=0.9, lam=0.8).targets_BT,
        lambda p: o.whiten(p[0], MASK),
    ):
        assert torch.equal(made(parts), made(spoilt))
