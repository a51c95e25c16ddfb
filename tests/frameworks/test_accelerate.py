"""accelerate: prepared optimizers and schedules, accumulation, clipping, bfloat16, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
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


def forget() -> None:
    """accelerate allows one setting for each process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


def combined(model: nn.Module) -> Any:
    hidden, others = stepwell.groups.muon_split(model)
    return stepwell.Combined(
        {"muon": stepwell.Muon(hidden, lr=1e-2), "adamw": stepwell.AdamW(others, lr=1e-3)}
    )


class Run:
    """A training in accelerate's manner, that can stop and go on."""

    def __init__(
        self,
        library: Any,
        rule: str = "AdamW",
        curve: str | None = None,
        clip: float | None = None,
        **options: Any,
    ) -> None:
        forget()
        self.accelerator = Accelerator(cpu=True, **options)
        self.clip = clip
        model = network()
        optimizer = combined(model)
        if rule != "Combined":
            optimizer = getattr(library, rule)(model.parameters(), lr=1e-2)
        schedule = library.lr_scheduler.ConstantLR(optimizer, 1.0)
        if curve is not None:
            schedule = getattr(library.lr_scheduler, curve)(optimizer, **CURVES[curve])
        self.model, self.optimizer, self.batches, self.schedule = self.accelerator.prepare(
            model, optimizer, batches(), schedule
        )

    def train(self, epochs: int = 2) -> list[Tensor]:
        for _ in range(epochs):
            for inputs, labels in self.batches:
                with self.accelerator.accumulate(self.model):
                    loss = nn.functional.cross_entropy(self.model(inputs), labels)
                    self.accelerator.backward(loss)
                    if self.clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
        return weights(self.model)


@pytest.mark.parametrize("curve", CURVES)
def test_a_prepared_schedule(curve: str) -> None:
    runs = [Run(library, curve=curve) for library in LIBRARIES]
    assert_same(*[run.train() for run in runs])
    assert_same(*[run.schedule.get_last_lr() for run in runs])


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.1}, {"gradient_accumulation_steps": 2, "clip": 0.1, "curve": "LinearLR"}],
    ids=["plain", "clipping", "accumulation"],
)
@pytest.mark.parametrize("rule", ["AdamW", "SGD", "Adagrad", "RAdam", "Adafactor"])
def test_every_way_of_training(rule: str, options: dict[str, Any]) -> None:
    assert_same(*[Run(library, rule=rule, **options).train() for library in LIBRARIES])


def test_bfloat16() -> None:
    runs = [Run(library, mixed_precision="bf16").train() for library in LIBRARIES]
    assert_same(*runs, rtol=1e-3, atol=1e-4)


def test_the_same_weights_as_without_accelerate() -> None:
    assert_identical(plainly_trained(stepwell, lr=1e-2), Run(stepwell).train(epochs=2))


def test_no_step_was_skipped() -> None:
    run = Run(stepwell)
    run.train()
    assert not run.accelerator.optimizer_step_was_skipped
    assert not run.optimizer.step_was_skipped


@pytest.mark.parametrize("rule", ["AdamW", "Combined"])
@pytest.mark.parametrize("curve", ["StepLR", "CosineAnnealingLR", "LambdaLR"])
def test_saved_and_loaded_state_goes_on_to_the_bit(curve: str, rule: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "clip": 0.1, "rule": rule}
    through = Run(stepwell, curve=curve, **options)
    through.train(epochs=1)
    through.accelerator.save_state(str(tmp_path))
    end = through.train(epochs=2)

    resumed = Run(stepwell, curve=curve, **options)
    resumed.accelerator.load_state(str(tmp_path))
    assert_identical(end, resumed.train(epochs=2))


def test_state_that_was_saved_with_torch_is_loaded(tmp_path: Path) -> None:
    begun = Run(torch.optim, curve="CosineAnnealingLR")
    begun.train(epochs=1)
    begun.accelerator.save_state(str(tmp_path))
    ends = [begun.train(epochs=2)]
    for library in LIBRARIES:
        resumed = Run(library, curve="CosineAnnealingLR")
        resumed.accelerator.load_state(str(tmp_path))
        ends.append(resumed.train(epochs=2))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@pytest.mark.parametrize("unwrapped", [True, False], ids=["unwrapped", "as it is"])
def test_our_own_checkpoint_of_a_wrapped_optimizer(unwrapped: bool, tmp_path: Path) -> None:
    """The wrappers go in and come out: the file is of the optimizer that they hold."""
    through = Run(stepwell, curve="CosineAnnealingLR")
    through.train(epochs=1)
    file = tmp_path / "run.safetensors"
    checkpoint.save(
        file, model=through.model, optimizer=through.optimizer, scheduler=through.schedule
    )
    end = through.train(epochs=1)

    resumed = Run(stepwell, curve="CosineAnnealingLR")
    optimizer, schedule = resumed.optimizer, resumed.schedule
    if unwrapped:
        optimizer, schedule = optimizer.optimizer, schedule.scheduler
    checkpoint.load(file, model=resumed.model, optimizer=optimizer, scheduler=schedule)
    assert_identical(end, resumed.train(epochs=1))
