"""The triangle multiplicative update in three Triton kernels, and a plain way for the CPU.

B batch, N positions, C channels, H = 128 hidden channels, P = N * N pairs of one example. Sides are
kept as planes, shape (B, 2 H, N, N), so that the triangle is one batched product.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

SETTINGS: dict[str, Any] = {}
TRITON = True
EPS = 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIDES = ("left_proj", "right_proj", "left_gate", "right_gate")

Weights = dict[str, torch.Tensor]
Data = tuple[torch.Tensor, torch.Tensor, Weights, dict[str, Any]]


@triton.jit
def project(
    x_ptr, mask_ptr, scale_ptr, shift_ptr, weight_ptr, sides_ptr, gate_ptr, pairs, dim,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Layer norm and one of three projections of ROWS pairs: left side, right side, last gate.

    Weights lie one below the other: left, right, left gate, right gate, last gate, each (H, C).
    """
    which, example = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = pair < pairs
    row = (example * pairs + pair) * dim
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < dim)[None, :]
        total += tl.sum(tl.load(x_ptr + row[:, None] + column[None, :], inside, 0.0), 1)
    mean = total / dim
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < dim)[None, :]
        x = tl.load(x_ptr + row[:, None] + column[None, :], inside, 0.0)
        away = tl.where(inside, x - mean[:, None], 0.0)
        total += tl.sum(away * away, 1)
    spread = 1 / tl.sqrt(total / dim + EPS)
    hidden = tl.arange(0, H)
    value = tl.zeros((ROWS, H), tl.float32)
    gate = tl.zeros((ROWS, H), tl.float32)
    # The last gate has no value beside it: it is projected alone.
    gate_row = tl.where(which == 2, 4 * H, (2 + which) * H)
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < dim
        inside = there[:, None] & valid[None, :]
        x = tl.load(x_ptr + row[:, None] + column[None, :], inside, 0.0)
        scale = tl.load(scale_ptr + column, valid, 0.0)
        shift = tl.load(shift_ptr + column, valid, 0.0)
        h = (x - mean[:, None]) * spread[:, None] * scale[None, :] + shift[None, :]
        h = tl.where(inside, h, 0.0)
        across = hidden[None, :] * dim + column[:, None]
        weight = tl.load(weight_ptr + gate_row * dim + across, valid[:, None], 0.0)
        if HALF:
            gate += tl.dot(h.to(tl.float16), weight.to(tl.float16))
        else:
            gate += tl.dot(h, weight, input_precision=PRECISION)
        if which < 2:
            weight = tl.load(weight_ptr + which * H * dim + across, valid[:, None], 0.0)
            if HALF:
                value += tl.dot(h.to(tl.float16), weight.to(tl.float16))
            else:
                value += tl.dot(h, weight, input_precision=PRECISION)
    gate = 1 / (1 + tl.exp(-gate))
    if which < 2:
        mask = tl.load(mask_ptr + example * pairs + pair, there, 0.0)
        side = (value * gate * mask[:, None]).to(sides_ptr.dtype.element_ty)
        plane = example * 2 * H + which * H + hidden
        tl.store(sides_ptr + plane[None, :] * pairs + pair[:, None], side, there[:, None])
    else:
        at = (example * pairs + pair)[:, None] * H + hidden[None, :]
        tl.store(gate_ptr + at, gate.to(gate_ptr.dtype.element_ty), there[:, None])


@triton.jit
def triangle(
    sides_ptr, update_ptr, n,
    H: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one plane: the sum over k of left[i, k] * right[j, k]."""
    tiles = tl.cdiv(n, TILE)
    tile, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = (tile // tiles) * TILE + tl.arange(0, TILE)
    j = (tile % tiles) * TILE + tl.arange(0, TILE)
    example, channel = plane // H, plane % H
    left = sides_ptr + (example * 2 * H + channel) * n * n
    right = left + tl.full((), H, tl.int64) * n * n
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, n, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = (i < n)[:, None] & (k < n)[None, :]
        a = tl.load(left + i[:, None] * n + k[None, :], inside, 0.0)
        inside = (k < n)[:, None] & (j < n)[None, :]
        b = tl.load(right + j[None, :] * n + k[:, None], inside, 0.0)
        total += tl.dot(a, b, input_precision=PRECISION)
    inside = (i < n)[:, None] & (j < n)[None, :]
    tl.store(update_ptr + plane * n * n + i[:, None] * n + j[None, :], total, inside)


@triton.jit
def finish(
    update_ptr, gate_ptr, scale_ptr, shift_ptr, weight_ptr, out_ptr, pairs, dim,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Second layer norm, gate and output projection of ROWS pairs."""
    example = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = pair < pairs
    hidden = tl.arange(0, H)
    plane = (example * H + hidden) * pairs
    u = tl.load(update_ptr + plane[None, :] + pair[:, None], there[:, None], 0.0)
    away = u - (tl.sum(u, 1) / H)[:, None]
    spread = 1 / tl.sqrt(tl.sum(away * away, 1) / H + EPS)
    scale, shift = tl.load(scale_ptr + hidden), tl.load(shift_ptr + hidden)
    at = (example * pairs + pair)[:, None] * H + hidden[None, :]
    gate = tl.load(gate_ptr + at, there[:, None], 0.0).to(tl.float32)
    h = (away * spread[:, None] * scale[None, :] + shift[None, :]) * gate
    for start in range(0, dim, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < dim
        weight = tl.load(weight_ptr + column[None, :] * H + hidden[:, None], valid[None, :], 0.0)
        if HALF:
            out = tl.dot(h.to(tl.float16), weight.to(tl.float16))
        else:
            out = tl.dot(h, weight, input_precision=PRECISION)
        to = (example * pairs + pair)[:, None] * dim + column[None, :]
        tl.store(out_ptr + to, out, there[:, None] & valid[None, :])


@torch.no_grad()
def custom_kernel(data: Data) -> torch.Tensor:
    """The update of (x, mask, weights, config), shape (B, N, N, C)."""
    if data[0].is_cuda or INTERPRETED:
        return on_gpu(data)
    return on_cpu(data)


def on_gpu(data: Data) -> torch.Tensor:
    """The three kernels, one after the other."""
    x, mask, weights, config = data
    batch, n, _, dim = x.shape
    hidden, pairs = config["hidden_dim"], n * n
    kept = torch.float16 if SETTINGS["precision"]["half"] else torch.float32
    sides = torch.empty((batch, 2 * hidden, n, n), dtype=kept, device=x.device)
    gate = torch.empty((batch, n, n, hidden), dtype=kept, device=x.device)
    update = torch.empty((batch, hidden, n, n), dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    stacked = torch.cat([weights[f"{name}.weight"] for name in (*SIDES, "out_gate")])
    blocks, warps = blocks_in_use(), SETTINGS["warps"]
    grid = (triton.cdiv(pairs, blocks["rows"]), 3, batch)
    project[grid](
        x, mask, weights["norm.weight"], weights["norm.bias"], stacked, sides, gate, pairs, dim,
        **constants()["project"], num_warps=warps,
    )  # fmt: skip
    grid = (triton.cdiv(n, blocks["tile"]) ** 2, batch * hidden)
    triangle[grid](sides, update, n, **constants()["triangle"], num_warps=warps)
    grid = (triton.cdiv(pairs, blocks["rows"]), batch)
    finish[grid](
        update, gate, weights["to_out_norm.weight"], weights["to_out_norm.bias"],
        weights["to_out.weight"], out, pairs, dim, **constants()["finish"], num_warps=warps,
    )  # fmt: skip
    return out


def blocks_in_use() -> dict[str, int]:
    """Sizes of blocks; the interpreter pays for programs, not for what they hold."""
    return SETTINGS["interpreted" if INTERPRETED else "blocks"]


def constants() -> dict[str, dict[str, Any]]:
    """The compile-time arguments of each kernel."""
    blocks, precision = blocks_in_use(), SETTINGS["precision"]
    rows = {
        "H": 128, "ROWS": blocks["rows"], "COLUMNS": blocks["columns"], "HALF": precision["half"],
        "PRECISION": precision["single"], "EPS": EPS,
    }  # fmt: skip
    tile = {"H": 128, "TILE": blocks["tile"], "DEPTH": blocks["depth"]}
    return {
        "project": rows,
        "triangle": {**tile, "PRECISION": precision["single"]},
        "finish": rows,
    }


def triton_builds() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of each kernel, for a compiler without a GPU."""
    kept = "*fp16" if SETTINGS["precision"]["half"] else "*fp32"
    types = {"sides_ptr": kept, "gate_ptr": kept, "pairs": "i32", "dim": "i32", "n": "i32"}
    builds = []
    for kernel in (project, triangle, finish):
        fixed = constants()[kernel.fn.__name__]
        signature = {
            name: "constexpr" if name in fixed else types.get(name, "*fp32")
            for name in kernel.arg_names
        }
        builds.append((kernel, signature, fixed, {"num_warps": SETTINGS["warps"]}))
    return builds


def on_cpu(data: Data) -> torch.Tensor:
    """The same in PyTorch: sides projected into planes, one batched product."""
    x, mask, weights, config = data
    hidden, dim = config["hidden_dim"], x.shape[-1]
    stacked = torch.cat([weights[f"{name}.weight"] for name in SIDES])
    out = torch.empty_like(x)
    for b, n in enumerate([x.shape[1]] * len(x)):
        h = F.layer_norm(x[b].view(-1, dim), (dim,), weights["norm.weight"], weights["norm.bias"])
        value, gate = torch.mm(stacked, h.t()).split(2 * hidden)
        left, right = value.mul_(gate.sigmoid_()).mul_(mask[b].view(1, -1)).view(2, hidden, n, n)
        update = torch.bmm(left, right.transpose(1, 2)).view(hidden, -1).t().contiguous()
        scale, shift = weights["to_out_norm.weight"], weights["to_out_norm.bias"]
        update = F.layer_norm(update, (hidden,), scale, shift)
        update.mul_(torch.mm(h, weights["out_gate.weight"].t()).sigmoid_())
        torch.mm(update, weights["to_out.weight"].t(), out=out[b].view(-1, dim))
    return out
