"""The algorithms of the weights lever, as pure functions over tensors.

Letters: B answers of a step, T tokens of an answer (padded to the right), V vocabulary, P pairs.
`mask_BT` is 1 for tokens of the answer and 0 for padding. `groups_B` holds equal integers for
answers to the same item. Functions that end in `loss` are minimised; every loss is a sum over
weighted tokens, so that the losses of the micro-batches of a step add up to the loss of the step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LN2 = math.log(2.0)
NEAR_TIE = 1e-12  # of a group's spread: rewards closer to the best one are as good as it


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """What each answer of a step was worth.

    Attributes:
        values_B: Advantage of each answer; 0 without a signal.
        signal_B: Whether the answer's group told good from bad; False for groups of equal rewards.
    """

    values_B: Tensor
    signal_B: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenAdvantages:
    """What each token of a step was worth, and what the value head should have said, (B, T)."""

    values_BT: Tensor
    targets_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of the better and of the worse answer of each pair, (P,)."""

    chosen_P: Tensor
    rejected_P: Tensor


def token_weights(mask_BT: Tensor, *, average: str, length: int | None = None) -> Tensor:
    """Weight of each token in the loss of a step, (B, T); 0 for padding.

    Args:
        mask_BT: 1 for tokens that count.
        average: `token`: all tokens of the step weigh the same (DAPO). `sequence`: all answers
            weigh the same, whatever their length (the original GRPO). `constant`: every token
            weighs 1 / (B * length), so that length is not normalised at all (Dr. GRPO).
        length: For `constant`: the longest answer that could have been given, in tokens.

    Raises:
        ValueError: `average` is unknown, or `constant` lacks its length.
    """
    if average == "token":
        return mask_BT / mask_BT.sum().clamp(min=1)
    if average == "sequence":
        return mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1) / max(mask_BT.shape[0], 1)
    if average == "constant" and length:
        return mask_BT / (max(mask_BT.shape[0], 1) * length)
    raise ValueError(f"average={average!r} with length={length!r}; see token_weights")


def group_mean(values_B: Tensor, groups_B: Tensor) -> Tensor:
    """Mean of each answer's group, (B,)."""
    index_B, sizes_N = _groups(groups_B)
    sums_N = values_B.new_zeros(len(sizes_N)).index_add(0, index_B, values_B)
    return (sums_N / sizes_N)[index_B]


def group_sizes(groups_B: Tensor) -> Tensor:
    """Size of each answer's group, (B,)."""
    index_B, sizes_N = _groups(groups_B)
    return sizes_N[index_B]


def group_signal(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """Whether the rewards of each answer's group differ at all, (B,) of bool."""
    index_B, sizes_N = _groups(groups_B)
    zeros_N = rewards_B.new_zeros(len(sizes_N))
    high_N = (zeros_N - math.inf).scatter_reduce(0, index_B, rewards_B, "amax")
    low_N = (zeros_N + math.inf).scatter_reduce(0, index_B, rewards_B, "amin")
    return (high_N > low_N)[index_B]


def group_advantages(
    rewards_B: Tensor,
    groups_B: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
) -> Advantages:
    """Rewards relative to the other answers to the same item.

    Args:
        rewards_B: Any real numbers; shifting a whole group changes nothing.
        groups_B: Item of each answer.
        baseline: `mean` of the group; `leave_one_out`: the mean of the group's other answers
            (RLOO), which keeps the gradient unbiased; `batch`: the mean of all answers, where
            there is one answer an item.
        scale: Divide by the standard deviation (n - 1 in the denominator) of the `group` (GRPO),
            of the whole `batch`, or by nothing: `none` (Dr. GRPO).
        eps: Added to the standard deviation.

    Raises:
        ValueError: An option is unknown.
    """
    if baseline not in ("mean", "leave_one_out", "batch") or scale not in (
        "group",
        "batch",
        "none",
    ):
        raise ValueError(f"baseline={baseline!r}, scale={scale!r}; see group_advantages")
    if baseline == "batch":
        groups_B = torch.zeros_like(groups_B)
    signal_B = group_signal(rewards_B, groups_B)
    sizes_B = group_sizes(groups_B)
    values_B = rewards_B - group_mean(rewards_B, groups_B)
    others_B = (sizes_B - 1).clamp(min=1)
    if scale == "group":
        std_B = (group_mean(values_B**2, groups_B) * sizes_B / others_B).sqrt()
        values_B = values_B / (std_B + eps)
    elif scale == "batch":
        values_B = values_B / (rewards_B.std() + eps)
    if baseline == "leave_one_out":
        values_B = values_B * sizes_B / others_B
    return Advantages(values_B=torch.where(signal_B, values_B, 0.0), signal_B=signal_B)


def entropic_weights(
    rewards_B: Tensor, groups_B: Tensor, *, kl: float = LN2, halvings: int = 100
) -> Tensor:
    """Weights proportional to exp(beta * reward) inside each group, (B,); they sum to 1 per group.

    The inverse temperature beta is solved per group by bisection, so that the weights are `kl`
    nats away from uniform: ln 2 leaves an effective sample of about half the group. Weights cannot
    move further than ln(size / number of best answers); a group that cannot reach `kl` gets the
    limit, equal weights on its best answers. Equal rewards give uniform weights.
    """
    index_B, sizes_N = _groups(groups_B)
    exact_B = rewards_B.double()
    zeros_N = exact_B.new_zeros(len(sizes_N))
    best_N = (zeros_N - math.inf).scatter_reduce(0, index_B, exact_B, "amax")
    worst_N = (zeros_N + math.inf).scatter_reduce(0, index_B, exact_B, "amin")
    spread_N = torch.where(best_N > worst_N, best_N - worst_N, 1.0)
    # In units of the group's spread, so that beta does not depend on the scale of the reward.
    gaps_B = (exact_B - best_N[index_B]) / spread_N[index_B]
    gaps_B = torch.where(gaps_B > -NEAR_TIE, 0.0, gaps_B)
    top_B = (gaps_B == 0).double()
    tops_N = zeros_N.index_add(0, index_B, top_B)
    reachable_N = torch.log(sizes_N / tops_N) > kl

    def tilted(beta_N: Tensor) -> Tensor:
        raw_B = torch.exp(beta_N[index_B] * gaps_B)
        return raw_B / zeros_N.index_add(0, index_B, raw_B)[index_B]

    def short(beta_N: Tensor) -> Tensor:
        return reachable_N & (_kl_to_uniform(tilted(beta_N), index_B, sizes_N) < kl)

    low_N, high_N = zeros_N, zeros_N + 1.0
    for _ in range(halvings):
        if not bool((short_N := short(high_N)).any()):
            break
        high_N = torch.where(short_N, high_N * 2, high_N)
    for _ in range(halvings):
        middle_N = (low_N + high_N) / 2
        short_N = short(middle_N)
        low_N = torch.where(short_N, middle_N, low_N)
        high_N = torch.where(short_N, high_N, middle_N)
    limit_B = top_B / tops_N[index_B]
    return torch.where(reachable_N[index_B], tilted(high_N), limit_B).to(rewards_B.dtype)


def entropic_advantages(
    rewards_B: Tensor, groups_B: Tensor, *, kl: float = LN2, cap: float = 10.0
) -> Advantages:
    """Advantage w_i / mean of the other answers' weights - 1, from `entropic_weights`.

    Unlike group-normalised advantages these grow with how rare a success is: answers below average
    tend to -1, the few best share the rest.

    Args:
        rewards_B: Any real numbers; only their order and relative distances inside a group count.
        groups_B: Item of each answer.
        kl: Distance of the weights from uniform, in nats.
        cap: Upper limit of an advantage: when one answer holds all the weight, the others' mean is
            0 and the quotient has no limit (always so in groups of two).
    """
    weights_B = entropic_weights(rewards_B, groups_B, kl=kl)
    signal_B = group_signal(rewards_B, groups_B)
    others_B = (1 - weights_B).clamp(min=0) / (group_sizes(groups_B) - 1).clamp(min=1)
    values_B = (weights_B / others_B.clamp(min=torch.finfo(weights_B.dtype).tiny) - 1).clamp(
        max=cap
    )
    return Advantages(values_B=torch.where(signal_B, values_B, 0.0), signal_B=signal_B)


def best_of_group(rewards_B: Tensor, groups_B: Tensor, *, top_k: int) -> Tensor:
    """The `top_k` best answers of each group, (B,) of bool; of equal ones the earlier ones.

    A group whose rewards are all equal has no best answer: none of it is chosen.
    """
    order_B = torch.argsort(rewards_B, descending=True, stable=True)
    order_B = order_B[torch.argsort(groups_B[order_B], stable=True)]
    sorted_B = groups_B[order_B]
    starts_B = torch.searchsorted(sorted_B, sorted_B)
    rank_B = torch.arange(len(order_B), device=order_B.device) - starts_B
    chosen_B = torch.zeros_like(groups_B, dtype=torch.bool)
    chosen_B[order_B] = rank_B < top_k
    return chosen_B & group_signal(rewards_B, groups_B)


def best_and_worst(rewards_B: Tensor, groups_B: Tensor) -> Pairs:
    """The best and the worst answer of each group with a signal; of equal ones the earlier one."""
    signal_B = group_signal(rewards_B, groups_B)
    chosen, rejected = [], []
    for group in torch.unique(groups_B[signal_B]):
        members = torch.nonzero(groups_B == group).flatten()
        chosen.append(members[rewards_B[members].argmax()])
        rejected.append(members[rewards_B[members].argmin()])
    if not chosen:
        return Pairs(chosen_P=groups_B.new_zeros(0), rejected_P=groups_B.new_zeros(0))
    return Pairs(chosen_P=torch.stack(chosen), rejected_P=torch.stack(rejected))


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float
) -> TokenAdvantages:
    """Generalised advantage estimates and the value targets; 0 on padding.

    delta_t = r_t + gamma * V_{t+1} - V_t, advantage_t = delta_t + gamma * lam * advantage_{t+1};
    the value after the last token is 0. Target: advantage + value. Neither carries a gradient.
    """
    rewards_BT, values_BT = _counted(rewards_BT, mask_BT), _counted(values_BT.detach(), mask_BT)
    advantages_BT = torch.zeros_like(values_BT)
    following_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(following_B)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        following_B = (delta_B + gamma * lam * following_B) * mask_BT[:, t]
        advantages_BT[:, t] = following_B
        next_value_B = values_BT[:, t]
    return TokenAdvantages(values_BT=advantages_BT, targets_BT=advantages_BT + values_BT)


def whiten(values_BT: Tensor, mask_BT: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Shifted and scaled to mean 0 and (sample) variance 1 over the tokens that count."""
    n = mask_BT.sum().clamp(min=1)
    values_BT = _counted(values_BT, mask_BT)
    mean = values_BT.sum() / n
    variance = ((values_BT - mean) ** 2 * mask_BT).sum() / (n - 1).clamp(min=1)
    return (values_BT - mean) * torch.rsqrt(variance + eps) * mask_BT


def cross_entropy_loss(logprobs_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Negative log-likelihood of the answers (`sft`, `best_of_n`)."""
    return -_weighted(logprobs_BT, weights_BT)


def reinforce_loss(logprobs_BT: Tensor, advantages_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Score-function loss: -advantage * log-probability, for answers of the present policy."""
    return -_weighted(advantages_BT * _counted(logprobs_BT, weights_BT), weights_BT)


def clipped_loss(
    logprobs_BT: Tensor,
    old_BT: Tensor,
    advantages_BT: Tensor,
    weights_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Pessimistic surrogate -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    A token that became likelier than 1 + clip_high times (A > 0), or rarer than 1 - clip_low times
    (A < 0), pulls no further. The two limits differ in DAPO ("clip higher"). Advantages are (B, T),
    or (B, 1) for one per answer.
    """
    ratio_BT = torch.exp(_counted(logprobs_BT - old_BT, weights_BT))
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return -_weighted(
        torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT), weights_BT
    )


def kl_to_base(logprobs_BT: Tensor, base_BT: Tensor, *, estimator: str = "k3") -> Tensor:
    """Estimate of KL(policy || base) from tokens that the policy sampled, (B, T).

    `k1` is log(policy / base): unbiased, of either sign. Its gradient as a loss is zero on average,
    so it belongs into the reward, not the loss. `k3` is base / policy - 1 - log(base / policy):
    never negative, of lower variance, and with a gradient that pulls towards the base.

    Raises:
        ValueError: `estimator` is neither.
    """
    if estimator == "k1":
        return logprobs_BT - base_BT
    if estimator == "k3":
        return torch.expm1(base_BT - logprobs_BT) - (base_BT - logprobs_BT)
    raise ValueError(f"estimator={estimator!r} is neither k1 nor k3")


def kl_loss(
    logprobs_BT: Tensor, base_BT: Tensor, weights_BT: Tensor, *, old_BT: Tensor | None = None
) -> Tensor:
    """Weighted sum of the estimate `k3`.

    Args:
        logprobs_BT: Of the policy.
        base_BT: Of the base.
        weights_BT: 0 on padding.
        old_BT: Of the policy that sampled the answers. If given, each estimate is multiplied by the
            ratio of policy to it, whose gradient makes that of the sum unbiased (DeepSeek-V3.2).
    """
    counted_BT = _counted(logprobs_BT, weights_BT)
    estimates_BT = kl_to_base(counted_BT, _counted(base_BT, weights_BT))
    if old_BT is not None:
        estimates_BT = torch.exp(counted_BT - _counted(old_BT, weights_BT)) * estimates_BT
    return _weighted(estimates_BT, weights_BT)


def value_loss(
    values_BT: Tensor,
    old_BT: Tensor,
    targets_BT: Tensor,
    weights_BT: Tensor,
    *,
    clip: float | None,
) -> Tensor:
    """Half the squared error of the value head; with `clip`, the worse of it and its clipped twin.

    The clipped twin moves at most `clip` away from the value at sampling time, so that one round
    cannot throw the value head far.
    """
    values_BT, old_BT = _counted(values_BT, weights_BT), _counted(old_BT, weights_BT)
    targets_BT = _counted(targets_BT, weights_BT)
    error_BT = (values_BT - targets_BT) ** 2
    if clip is not None:
        near_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
        error_BT = torch.maximum(error_BT, (near_BT - targets_BT) ** 2)
    return 0.5 * _weighted(error_BT, weights_BT)


def entropy_bonus(entropy_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Weighted entropy of the next-token distributions; subtracted from a loss."""
    return _weighted(entropy_BT, weights_BT)


def dpo_losses(
    chosen_P: Tensor,
    rejected_P: Tensor,
    base_chosen_P: Tensor,
    base_rejected_P: Tensor,
    *,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta * (log-ratio of the better answer - log-ratio of the worse one)), (P,).

    Arguments are log-probabilities of whole answers, under the policy and under the base.
    """
    margin_P = (chosen_P - base_chosen_P) - (rejected_P - base_rejected_P)
    return -functional.logsigmoid(beta * margin_P)


def _groups(groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Which of N groups each answer is in, (B,), and how large each is, (N,)."""
    found: tuple[Tensor, Tensor, Tensor] = torch.unique(
        groups_B, return_inverse=True, return_counts=True
    )
    return found[1], found[2]


def _counted(values_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """The values of tokens that count, 0 elsewhere: padding reaches neither loss nor gradient."""
    return torch.where(weights_BT != 0, values_BT, 0.0)


def _weighted(values_BT: Tensor, weights_BT: Tensor) -> Tensor:
    return (_counted(values_BT, weights_BT) * weights_BT).sum()


def _kl_to_uniform(weights_B: Tensor, index_B: Tensor, sizes_N: Tensor) -> Tensor:
    """KL(weights || uniform) of each group, in nats, (N,)."""
    terms_B = torch.xlogy(weights_B, weights_B * sizes_N[index_B])
    return weights_B.new_zeros(len(sizes_N)).index_add(0, index_B, terms_B)
