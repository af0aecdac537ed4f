"""The triangle multiplicative update (outgoing), eager, in single precision: what is to be matched.

B batch, N positions, C channels of the input, H = 128 hidden channels.
"""

from typing import Any

import torch
from torch.nn import functional as F

Data = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]

ATOL = RTOL = 2e-2  # |submission - reference| <= ATOL + RTOL * |reference|, everywhere


@torch.no_grad()
def reference(data: Data) -> torch.Tensor:
    """The update of `data`, shape (B, N, N, C), a new tensor.

    Args:
        data: x, shape (B, N, N, C); mask of ones and zeros, shape (B, N, N); weights by name (see
            `inputs.py`); and {"dim": C, "hidden_dim": H}.
    """
    x, mask, weights, config = data
    dim, hidden = config["dim"], config["hidden_dim"]
    h = F.layer_norm(x, (dim,), weights["norm.weight"], weights["norm.bias"])
    left = F.linear(h, weights["left_proj.weight"]) * mask.unsqueeze(-1)
    right = F.linear(h, weights["right_proj.weight"]) * mask.unsqueeze(-1)
    left = left * F.linear(h, weights["left_gate.weight"]).sigmoid()
    right = right * F.linear(h, weights["right_gate.weight"]).sigmoid()
    gate = F.linear(h, weights["out_gate.weight"]).sigmoid()
    out = torch.einsum("bikh,bjkh->bijh", left, right)
    out = F.layer_norm(out, (hidden,), weights["to_out_norm.weight"], weights["to_out_norm.bias"])
    return F.linear(out * gate, weights["to_out.weight"])
