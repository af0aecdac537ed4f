"""The triangle multiplicative update, one example of the batch at a time, as SETTINGS say.

B batch, N positions, C channels, H hidden channels, P = N * N pairs, R pairs of one chunk.
`target_agent.py` writes this file as submission.py, with the settings of harness.yaml in it.
"""

from typing import Any

import torch
from torch.nn import functional as F

SETTINGS: dict[str, Any] = {}
SIDES = ("left_proj", "right_proj", "left_gate", "right_gate")
# Planes a power of two apart fall on the same lines of the cache when they are transposed.
PADDING = 16  # numbers

Weights = dict[str, torch.Tensor]


@torch.no_grad()
def custom_kernel(data: tuple[torch.Tensor, torch.Tensor, Weights, dict[str, Any]]) -> torch.Tensor:
    """The update of (x, mask, weights, config), shape (B, N, N, C)."""
    x, mask, weights, config = data
    update = channels_first if SETTINGS["layout"]["channels_first"] else channels_last
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        update(x[b], mask[b], weights, config["hidden_dim"], out[b])
    return out


def channels_last(
    x: torch.Tensor, mask: torch.Tensor, weights: Weights, hidden: int, out: torch.Tensor
) -> None:
    """As the definition says: channels are the last axis, the einsum finds its own way."""
    dim = x.shape[-1]
    h_PC = F.layer_norm(x.view(-1, dim), (dim,), weights["norm.weight"], weights["norm.bias"])
    if SETTINGS["projections"]["fused"]:
        fused = torch.cat([weights[f"{name}.weight"] for name in SIDES])
        parts = multiply(h_PC, fused.t(), "sides").split(hidden, dim=1)
    else:
        parts = [multiply(h_PC, weights[f"{name}.weight"].t(), "sides") for name in SIDES]
    left, right, left_gate, right_gate = parts
    mask_P1 = mask.reshape(-1, 1)
    shape = (*x.shape[:2], hidden)
    left = (left * left_gate.sigmoid() * mask_P1).to(kept_in("triangle")).view(shape)
    right = (right * right_gate.sigmoid() * mask_P1).to(kept_in("triangle")).view(shape)
    update_NNH = torch.einsum("ikh,jkh->ijh", left, right)
    gate_PH = multiply(h_PC, weights["out_gate.weight"].t(), "out_gate").sigmoid()
    finish(update_NNH.view(-1, hidden), gate_PH, weights, hidden, out.view(-1, x.shape[-1]))


def channels_first(
    x: torch.Tensor, mask: torch.Tensor, weights: Weights, hidden: int, out: torch.Tensor
) -> None:
    """Hidden channels are the first axis, so that the triangle is one batched product of planes."""
    n, dim = x.shape[1:]
    x_PC, out_PC, mask_P = x.view(-1, dim), out.view(-1, dim), mask.view(-1)
    pairs = len(x_PC)
    rows = SETTINGS["chunks"]["rows"] or pairs
    masked = not (SETTINGS["mask"]["look_first"] and bool(mask.all()))
    sides_WC = torch.cat([weights[f"{name}.weight"] for name in SIDES])
    gate_HC = weights["out_gate.weight"]
    scale_C, shift_C = weights["norm.weight"], weights["norm.bias"]
    sides_W, gate_H = None, None
    if SETTINGS["norm"]["folded"]:
        sides_W, gate_H = torch.mv(sides_WC, shift_C), torch.mv(gate_HC, shift_C)
        sides_WC, gate_HC = sides_WC * scale_C, gate_HC * scale_C
        scale_C = shift_C = None
    sides_2HP = torch.empty((2 * hidden, pairs), dtype=kept_in("triangle"), device=x.device)
    gate_PH = torch.empty((pairs, hidden), dtype=kept_in("out_gate"), device=x.device)
    for start in range(0, pairs, rows):
        chunk = slice(start, min(start + rows, pairs))
        h_RC = F.layer_norm(x_PC[chunk], (dim,), scale_C, shift_C)
        last_gate_RH = multiply(h_RC, gate_HC.t(), "out_gate", gate_H)
        torch.sigmoid(last_gate_RH, out=gate_PH[chunk])
        bias_W1 = None if sides_W is None else sides_W.unsqueeze(1)
        sides_WR = multiply(sides_WC, h_RC.t(), "sides", bias_W1)
        values_2HR, gates_2HR = sides_WR.split(2 * hidden)
        gates_2HR.sigmoid_()
        if masked:
            gates_2HR.mul_(mask_P[chunk].to(gates_2HR.dtype))
        torch.mul(values_2HR, gates_2HR, out=sides_2HP[:, chunk])
    left_HNN, right_HNN = sides_2HP.view(2, hidden, n, n)
    update_HP = torch.empty((hidden, pairs + PADDING), dtype=sides_2HP.dtype, device=x.device)
    update_HNN = update_HP[:, :pairs].unflatten(1, (n, n))
    with matmul_precision("triangle"):
        torch.bmm(left_HNN, right_HNN.transpose(1, 2), out=update_HNN)
    update_PH = update_HP.t()
    for start in range(0, pairs, rows):
        chunk = slice(start, min(start + rows, pairs))
        finish(update_PH[chunk], gate_PH[chunk], weights, hidden, out_PC[chunk])


def finish(
    update_RH: torch.Tensor, gate_RH: torch.Tensor, weights: Weights, hidden: int, out: torch.Tensor
) -> None:
    """Second layer norm, gate and output projection, written to `out`, shape (R, C)."""
    plain = update_RH.contiguous().float()
    scale, shift = weights["to_out_norm.weight"], weights["to_out_norm.bias"]
    h_RH = F.layer_norm(plain, (hidden,), scale, shift).mul_(gate_RH)
    kernel_HC = weights["to_out.weight"].t()
    if SETTINGS["precision"]["output"] == "bfloat16":
        out.copy_(torch.mm(h_RH.bfloat16(), kernel_HC.bfloat16()))
        return
    with matmul_precision("output"):
        torch.mm(h_RH, kernel_HC, out=out)


def multiply(
    a: torch.Tensor, b: torch.Tensor, part: str, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The matrix product at the precision of a part of the update, plus a bias."""
    if SETTINGS["precision"][part] == "bfloat16":
        product = torch.mm(a.bfloat16(), b.bfloat16())
    else:
        with matmul_precision(part):
            product = torch.mm(a, b)
    return product if bias is None else product.add_(bias)


def kept_in(part: str) -> torch.dtype:
    """The type of what a part of the update makes."""
    return torch.bfloat16 if SETTINGS["precision"][part] == "bfloat16" else torch.float32


class matmul_precision:
    """`mixed`: factors are rounded to bfloat16, sums and results are not."""

    def __init__(self, part: str) -> None:
        self._mixed = SETTINGS["precision"][part] == "mixed"

    def __enter__(self) -> None:
        if self._mixed:
            torch.set_float32_matmul_precision("medium")

    def __exit__(self, *_: object) -> None:
        if self._mixed:
            torch.set_float32_matmul_precision("highest")
