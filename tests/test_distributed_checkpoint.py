"""Does torch.distributed.checkpoint save and load our optimizers, on any number of processes?

A training of one process is saved and goes on on two, whose parameters are sharded; what these save
goes on on one. The oracle is the training that was never saved.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

import stepwell

from .cases import numbers
from .processes import in_processes

RULES = {
    "adamw": partial(stepwell.AdamW, lr=0.1),
    # of which a first step makes the momentum, and the second the average
    "averaged": partial(
        stepwell.averaged(stepwell.SGD), lr=0.1, momentum=0.9, average_start=2, average_decay=0.5
    ),
}


class Training(Stateful):
    """A model and its optimizer, as torch's tutorials wrap them for such checkpoints."""

    def __init__(self, rule: str, mesh: Any = None) -> None:
        torch.manual_seed(0 if mesh is None else 1)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
        if mesh is not None:
            fully_shard(self.model, mesh=mesh)
        self.optimizer = RULES[rule](self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )

    def go_on(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            self.model(numbers((4, 6), torch.float32, step)).square().mean().backward()
            self.optimizer.step()

    def assert_close(self, other: Training) -> None:
        for mine, its in zip(self.model.parameters(), other.model.parameters(), strict=True):
            # a gradient is a mean over two processes for some of the steps
            torch.testing.assert_close(mine.detach(), its.detach(), rtol=1e-4, atol=1e-5)
            for name, value in other.optimizer.state[its].items():
                found = self.optimizer.state[mine][name]
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def trainings(mesh: Any = None) -> dict[str, Training]:
    return {rule: Training(rule, mesh) for rule in RULES}


def _go_on(mesh: Any, folder: Path) -> None:
    both = trainings(mesh)
    dcp.load(both, checkpoint_id=folder / "one")
    for training in both.values():
        training.go_on(range(3, 6))
    dcp.save(both, checkpoint_id=folder / "two")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    both, resumed = trainings(), trainings()
    for training in both.values():
        training.go_on(range(3))
    dcp.save(both, checkpoint_id=tmp_path / "one", no_dist=True)
    in_processes(_go_on, tmp_path)
    dcp.load(resumed, checkpoint_id=tmp_path / "two", no_dist=True)
    for rule, training in both.items():
        training.go_on(range(3, 6))
        resumed[rule].assert_close(training)
        for each in (training, resumed[rule]):
            each.go_on(range(6, 8))
        resumed[rule].assert_close(training)
