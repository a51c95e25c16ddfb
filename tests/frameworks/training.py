"""A model, data and a comparison that the tests of all frameworks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stepwell

LIBRARIES = (torch.optim, stepwell)


def falling(step: int) -> float:
    return 1 / (1 + step)


CURVES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 1},
    "LinearLR": {"start_factor": 0.1, "total_iters": 4},
    "CosineAnnealingLR": {"T_max": 8},
    "OneCycleLR": {"max_lr": 0.05, "total_steps": 40},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.05, "step_size_up": 3},
    "LambdaLR": {"lr_lambda": falling},
}
"""Schedules with what their constructors are given, one of each kind."""


def data(rows: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def batches(rows: int = 32, size: int = 8) -> DataLoader[Any]:
    return DataLoader(data(rows), batch_size=size)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    """Two trainings, by their weights or losses; the last bits of torch and stepwell differ."""
    close = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    torch.testing.assert_close(other, one, **close)


def assert_identical(one: Any, other: Any) -> None:
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def plainly_trained(library: Any, steps: int = 8, **options: Any) -> list[Tensor]:
    """The weights after `steps` of AdamW in a loop of one's own."""
    model = network()
    optimizer = library.AdamW(model.parameters(), **options)
    for _, (inputs, labels) in zip(range(steps), [*batches()] * steps, strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return weights(model)
