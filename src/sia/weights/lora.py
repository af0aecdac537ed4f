"""A linear layer with a LoRA adapter that does the arithmetic of PEFT's in fewer passes.

Letters: M rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class LoraLinear(Linear):
    """PEFT's own layer, but for the one case that training is made of: a plain adapter.

    There the adapter's product is added where the base's product lies already, in both directions;
    scaling and adding apart from it cost as much as the products where layers are narrow. With a
    base in bfloat16 under autocast all products are in bfloat16, as PEFT's would be.
    """

    narrowed: tuple[Tensor, Tensor] | None = None  # A and B in the base's precision, see `narrow`

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the base plus that of the adapter."""
        if args or kwargs or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        if self.merged:
            found: Tensor = base(x)
            return found
        name, kind = self.active_adapters[0], x.device.type
        computed = torch.float32
        if torch.is_autocast_enabled(kind):
            computed = torch.get_autocast_dtype(kind)
        usual = (
            not self.lora_variant
            and len(self.active_adapters) == 1
            and isinstance(self.lora_dropout[name], nn.Identity)
            and self.lora_B[name].bias is None
            and base.weight.dtype == computed
        )
        if not usual:
            return super().forward(x)
        a_RI, b_OR = self.narrowed or (
            self.lora_A[name].weight.to(computed), self.lora_B[name].weight.to(computed)
        )  # fmt: skip
        found = _Adapted.apply(  # type: ignore[no-untyped-call]
            x.to(computed), base.weight, base.bias, a_RI, b_OR, self.scaling[name]
        )
        return found


@contextlib.contextmanager
def narrow(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Rounds all adapters once instead of in each pass, for passes without a gradient."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    try:
        for layer in layers:
            name = layer.active_adapters[0]
            a, b = (cast(nn.Linear, side[name]).weight for side in (layer.lora_A, layer.lora_B))
            layer.narrowed = a.detach().to(dtype), b.detach().to(dtype)
        yield
    finally:
        for layer in layers:
            layer.narrowed = None


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
