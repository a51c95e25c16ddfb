"""accelerate: prepared optimizers and schedules, accumulation, clipping, bfloat16, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

import stepwell
from stepwell import checkpoint

from ..processes import in_processes
from .training import (
    CURVES,
    LIBRARIES,
    assert_identical,
    assert_same,
    batches,
    falling,
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


@pytest.mark.parametrize("rule", ["AdamW", "Combined"])
def test_a_step_that_a_scaler_skips(rule: str) -> None:
    """In float16: no step, no step of the schedule, and `step_was_skipped` says so."""
    forget()
    Accelerator(cpu=True)
    model = network()
    inner = combined(model) if rule == "Combined" else stepwell.AdamW(model.parameters(), lr=1e-2)
    steps: list[Any] = []
    inner.register_step_post_hook(lambda *_: steps.append(True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    schedule = stepwell.lr_scheduler.LambdaLR(inner, falling)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    prepared = AcceleratedScheduler(schedule, optimizer)
    skipped = []
    for step, (inputs, labels) in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
        if step in (0, 2):
            model[0].weight.grad.fill_(torch.inf)
        before = weights(model)
        optimizer.step()
        prepared.step()
        skipped.append(optimizer.step_was_skipped)
        assert torch.equal(before[0], weights(model)[0]) == skipped[-1]
    assert skipped == [True, False, True, False]
    assert len(steps) == schedule.last_epoch == 2


SHARDED = ("AdamW", "Adagrad")


def test_fsdp2(tmp_path: Path) -> None:
    """Shards take the place of the parameters after the optimizer is made, with its state."""
    in_processes(sharded, tmp_path)
    for rule in SHARDED:
        model = network()
        optimizer = getattr(torch.optim, rule)(model.parameters(), lr=1e-2)
        for inputs, labels in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        assert_same(weights(model), torch.load(tmp_path / rule))


def sharded(mesh: Any, folder: Path) -> None:
    rank = distributed.get_rank()
    # accelerate asks for them, though the group of processes is there
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    for rule in SHARDED:
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True)
        # by itself it shards on GPUs only
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
        )
        model = network()
        optimizer = getattr(stepwell, rule)(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        for inputs, labels in batches():
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
        params = list(model.parameters())
        assert all(isinstance(param, DTensor) for param in params)
        assert {*optimizer.state} == {*params}
        whole = [param.full_tensor().detach() for param in params]
        if rank == 0:
            torch.save(whole, folder / rule)
