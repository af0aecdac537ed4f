"""The one LightningModule: a policy that follows a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sia.errors import WeightsError
from sia.weights.adapter import Head
from sia.weights.data import StepData, part_size
from sia.weights.memory import halving
from sia.weights.policy import Policy
from sia.weights.recipes import OnPolicy, Recipe


class Update(LightningModule):
    """Takes optimiser steps on a policy's adapter.

    Optimisation is manual, so that a step that ran out of memory is repeated in smaller parts; the
    parts of a step add up to its loss and gradient exactly.

    Attributes:
        curve: A dictionary for each step: step, loss, reward, gradient.
    """

    def __init__(self, *, policy: Policy, recipe: Recipe) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained and nothing of the base
        self.policy, self.recipe = policy, recipe
        self.trained = nn.ParameterList(policy.parameters())
        self.curve: list[dict[str, Any]] = []
        self._size: int | None = None

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up; heads have a learning rate of their own."""
        recipe = self.recipe
        of_heads = {
            id(parameter)
            for module in self.policy.module.modules()
            if isinstance(module, Head)
            for parameter in module.parameters()
        }
        trained = self.policy.parameters()
        heads = [parameter for parameter in trained if id(parameter) in of_heads]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if id(parameter) not in of_heads]},
            {"params": heads, "lr": recipe.head_lr or recipe.lr},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, recipe.pace)}

    def training_step(self, data: StepData, index: int) -> None:
        """One optimiser step.

        Raises:
            WeightsError: The loss or its gradient is not finite, or memory is too small.
        """
        optimizer: Any = self.optimizers()
        done = halving(
            lambda size: self._accumulate(data, size, optimizer),
            min(self._size or len(data.tokens.mask_BT), part_size(self.recipe, data.tokens)),
            unit=self.recipe.unit,
        )
        if done.size < part_size(self.recipe, data.tokens):
            self._size = done.size
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.max_grad_norm)
        loss, gradient = float(done.value), float(norm)
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            raise WeightsError(
                f"Step {data.index + 1}: the loss is {loss}, its gradient {gradient}. The parent's "
                f"adapter is as it was. Lower the learning rate: recipe.lr={self.recipe.lr / 3:.1g}"
            )
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.curve.append(
            {"step": data.index + 1, "loss": loss, "gradient": gradient, "reward": data.reward}
        )

    def _accumulate(self, data: StepData, size: int, optimizer: Any) -> Tensor:
        """Adds up the gradient of a step from parts of `size` answers; gives its loss."""
        recipe = self.recipe
        optimizer.zero_grad()
        total = torch.zeros((), device=data.batch.weights_BT.device)
        for start in range(0, len(data.tokens.mask_BT), size):
            part = slice(start, start + size)
            scores = self.policy.logprobs(
                data.tokens.rows(part),
                temperature=recipe.temperature if isinstance(recipe, OnPolicy) else 1.0,
                entropy=recipe.uses_entropy,
                values=recipe.uses_values,
            )
            loss = recipe.loss(scores, data.batch.rows(part))
            self.manual_backward(loss)
            total += loss.detach()
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the curve."""
        checkpoint["curve"] = self.curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reads the curve back."""
        self.curve = checkpoint["curve"]
