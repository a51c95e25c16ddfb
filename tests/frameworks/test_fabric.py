"""Lightning Fabric: optimizers that it set up, its checkpoints, and what it wraps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

import stepwell
from stepwell import checkpoint

from .training import (
    CURVES,
    LIBRARIES,
    assert_identical,
    assert_same,
    batches,
    network,
    plainly_trained,
    weights,
)


class Run:
    def __init__(
        self, library: Any, rule: str = "AdamW", curve: str = "StepLR", **options: Any
    ) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1, **options)
        model = network()
        optimizer = getattr(library, rule)(model.parameters(), lr=1e-2)
        schedules = library.lr_scheduler
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.schedule = getattr(schedules, curve)(self.optimizer, **CURVES[curve])

    def train(self, epochs: int = 2, clip: float | None = None) -> list[Tensor]:
        for _ in range(epochs):
            for inputs, labels in batches():
                self.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.model(inputs), labels)
                self.fabric.backward(loss)
                if clip is not None:
                    self.fabric.clip_gradients(self.model, self.optimizer, max_norm=clip)
                self.optimizer.step()
                self.schedule.step()
        return weights(self.model)

    def content(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_a_schedule_of_what_fabric_set_up(rule: str, curve: str) -> None:
    runs = [Run(library, rule, curve) for library in LIBRARIES]
    assert_same(*[run.train() for run in runs])
    assert_same(*[run.optimizer.param_groups[0]["lr"] for run in runs])


def test_clipping_and_bfloat16() -> None:
    assert_same(*[Run(library).train(clip=0.1) for library in LIBRARIES])
    runs = [Run(library, precision="bf16-mixed").train() for library in LIBRARIES]
    assert_same(*runs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("curve", ["StepLR", "OneCycleLR", "CyclicLR"])
def test_saved_and_loaded_it_goes_on_to_the_bit(curve: str, tmp_path: Path) -> None:
    through = Run(stepwell, curve=curve)
    through.train(epochs=1)
    through.fabric.save(tmp_path / "half.ckpt", through.content())
    end = through.train(epochs=2)
    resumed = Run(stepwell, curve=curve)
    resumed.fabric.load(tmp_path / "half.ckpt", resumed.content())
    assert_identical(end, resumed.train(epochs=2))


def test_our_own_checkpoint_of_a_wrapped_optimizer(tmp_path: Path) -> None:
    through = Run(stepwell)
    through.train(epochs=1)
    file = tmp_path / "half.safetensors"
    checkpoint.save(file, model=through.model, optimizer=through.optimizer)
    resumed = Run(stepwell)
    checkpoint.load(file, model=resumed.model, optimizer=resumed.optimizer)
    assert_identical(weights(through.model), weights(resumed.model))
    assert_identical(through.optimizer.state_dict(), resumed.optimizer.state_dict())


def test_hooks_run_once_for_each_step() -> None:
    run = Run(stepwell)
    calls: list[str] = []
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: calls.append("inner"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("wrapper"))
    run.train(epochs=1)
    assert calls == ["inner", "wrapper"] * 4


def test_the_wrapper_is_the_optimizer() -> None:
    run = Run(stepwell, curve="LambdaLR")
    inner = run.optimizer.optimizer
    assert repr(run.optimizer).startswith("FabricAdamW (\nParameter Group 0")
    assert run.optimizer.state is inner.state
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer.param_groups is inner.param_groups


def test_averaged_weights_of_the_wrapper() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    rule = stepwell.averaged(stepwell.AdamW)
    model, optimizer = fabric.setup(model, rule(model.parameters(), lr=1e-2, average_decay=0.5))
    for inputs, labels in batches():
        fabric.backward(nn.functional.cross_entropy(model(inputs), labels))
        optimizer.step()
    last = weights(model)
    with stepwell.averaged_weights(optimizer):
        assert not torch.equal(last[0], weights(model)[0])
    assert_identical(last, weights(model))


def test_without_a_schedule_it_is_a_loop_of_ones_own() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = fabric.setup(model, stepwell.AdamW(model.parameters(), lr=1e-2))
    for _ in range(2):
        for inputs, labels in batches():
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
    assert_identical(plainly_trained(stepwell, lr=1e-2), weights(model))
