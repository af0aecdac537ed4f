"""A linear layer with a LoRA adapter that does the arithmetic of PEFT's in fewer passes.

Letters: M rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class LoraLinear(Linear):
    """PEFT's own layer, but for the one case that training is made of: a plain adapter in float32.

    There the adapter's product is added where the base's product lies already, in both directions;
    scaling and adding apart from it cost as much as the products where layers are narrow.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the base plus that of the adapter."""
        if args or kwargs or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        if self.merged:
            found: Tensor = base(x)
            return found
        name = self.active_adapters[0]
        usual = (
            not self.lora_variant
            and len(self.active_adapters) == 1
            and isinstance(self.lora_dropout[name], nn.Identity)
            and self.lora_B[name].bias is None
            and x.dtype == base.weight.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
        )
        if not usual:
            return super().forward(x)
        found = _Adapted.apply(  # type: ignore[no-untyped-call]
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight,
            self.scaling[name],
        )  # fmt: skip
        return found


class _Adapted(torch.autograd.Function):
    """x W' + bias + scale * x A' B', with gradients for x, A and B; base and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        x_MI = x.reshape(-1, x.shape[-1])
        low_MR = x_MI @ a_RI.T
        y_MO = functional.linear(x_MI, weight_OI, bias_O)
        y_MO.addmm_(low_MR, b_OR.T, alpha=scale)
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR, low_MR)
        ctx.scale = scale
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR, low_MR = ctx.saved_tensors
        pull_MO = grads[0].reshape(-1, grads[0].shape[-1])
        pull_MR = (pull_MO @ b_OR).mul_(ctx.scale)
        pull_x = None
        if ctx.needs_input_grad[0]:
            pull_x = (pull_MO @ weight_OI).addmm_(pull_MR, a_RI).view(x.shape)
        pull_a_RI = pull_MR.T @ x.reshape(-1, x.shape[-1])
        pull_b_OR = (pull_MO.T @ low_MR).mul_(ctx.scale)
        return pull_x, None, None, pull_a_RI, pull_b_OR, None
