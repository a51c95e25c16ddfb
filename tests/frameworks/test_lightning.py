"""Lightning: every form of schedule, manual optimization, callbacks, checkpoints, hooks."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Module(pl.LightningModule):
    def __init__(self, configure: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.network = network()
        self.configure = configure

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.network(inputs), labels)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.configure(self.network)


class Rates(Callback):
    """The rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


def fit(module: pl.LightningModule, resume: str | Path | None = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(**QUIET | {"max_epochs": 2} | options)
    loader = batches()
    # who resumed one's own file may run code; that is Lightning's affair
    trainer.fit(
        module, loader, loader, ckpt_path=resume, **({"weights_only": False} if resume else {})
    )
    return trainer


def rates_and_weights(configure: Callable[[nn.Module], Any], **options: Any) -> tuple[Any, Any]:
    rates = Rates()
    module = Module(configure)
    callbacks = [rates, *options.pop("callbacks", [])]
    fit(module, callbacks=callbacks, **options)
    return rates.rates, weights(module)


def adamw(library: Any, model: nn.Module, **options: Any) -> Any:
    return library.AdamW(model.parameters(), **{"lr": 1e-2} | options)


def forms(optimizer: Any, schedule: Any) -> dict[str, Any]:
    """The ways in which `configure_optimizers` may return a schedule."""
    return {
        "lists": ([optimizer], [schedule]),
        "a dict": {"optimizer": optimizer, "lr_scheduler": schedule},
        "each step": {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        },
        "every third step": (
            [optimizer],
            [{"scheduler": schedule, "interval": "step", "frequency": 3, "name": "rate"}],
        ),
    }


@pytest.mark.parametrize("form", ["lists", "a dict", "each step", "every third step"])
@pytest.mark.parametrize("curve", CURVES)
def test_every_form_of_schedule(curve: str, form: str) -> None:
    def configured(library: Any) -> Callable[[nn.Module], Any]:
        def configure(model: nn.Module) -> Any:
            optimizer = adamw(library, model)
            schedule = getattr(library.lr_scheduler, curve)(optimizer, **CURVES[curve])
            return forms(optimizer, schedule)[form]

        return configure

    theirs, ours = [rates_and_weights(configured(library)) for library in LIBRARIES]
    assert len(set(ours[0])) > 1
    assert_same(theirs, ours)


def test_without_a_schedule_it_is_a_loop_of_ones_own() -> None:
    module = Module(lambda model: adamw(stepwell, model))
    fit(module)
    assert_identical(plainly_trained(stepwell, lr=1e-2), weights(module))


@pytest.mark.parametrize("rule", ["SGD", "LBFGS", "Adafactor", "NAdam", "Muon"])
def test_rules(rule: str) -> None:
    def configured(library: Any) -> Callable[[nn.Module], Any]:
        def configure(model: nn.Module) -> Any:
            params = [p for p in model.parameters() if p.dim() == 2 or rule != "Muon"]
            given = {"max_iter": 3} if rule == "LBFGS" else {}
            optimizer = getattr(library, rule)(params, lr=1e-2, **given)
            return [optimizer], [library.lr_scheduler.ExponentialLR(optimizer, 0.5)]

        return configure

    runs = [rates_and_weights(configured(library)) for library in LIBRARIES]
    # the search of LBFGS, and Muon's products in bfloat16, differ by more than a rounding
    assert_same(*runs, rtol=1e-3, atol=1e-4)


def test_a_plateau_with_a_monitor() -> None:
    def configured(library: Any) -> Callable[[nn.Module], Any]:
        def configure(model: nn.Module) -> Any:
            optimizer = adamw(library, model)
            plateau = library.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "loss", "strict": True},
            }

        return configure

    runs = [rates_and_weights(configured(library), max_epochs=4) for library in LIBRARIES]
    assert len(set(runs[1][0])) > 1
    assert_same(*runs)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"profiler": "simple"},
        {"profiler": "advanced"},
        {"detect_anomaly": True},
        {"overfit_batches": 2},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
def test_options_of_the_trainer(options: dict[str, Any]) -> None:
    def configured(library: Any) -> Callable[[nn.Module], Any]:
        def configure(model: nn.Module) -> Any:
            optimizer = adamw(library, model)
            return [optimizer], [library.lr_scheduler.StepLR(optimizer, 1)]

        return configure

    runs = [rates_and_weights(configured(library), **options) for library in LIBRARIES]
    rough = {"rtol": 1e-3, "atol": 1e-4} if "precision" in options else {}
    assert_same(*runs, **rough)


def test_fused_and_clipped_is_refused_as_with_torch() -> None:
    """Lightning does not clip for an optimizer that unscales by itself, in half precision."""
    for library in LIBRARIES:
        module = Module(lambda model, library=library: adamw(library, model, fused=True))
        fit(module, gradient_clip_val=0.1)


def test_the_monitor_of_rates(tmp_path: Path) -> None:
    logged = []
    for library in LIBRARIES:

        def configure(model: nn.Module, library: Any = library) -> Any:
            optimizer = library.AdamW(
                [
                    {"params": model[0].parameters(), "name": "in"},
                    {"params": model[3].parameters()},
                ],
                lr=1e-2,
            )
            return [optimizer], [library.lr_scheduler.StepLR(optimizer, 1)]

        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        logger = CSVLogger(str(tmp_path), name=library.__name__)
        fit(Module(configure), callbacks=[monitor], logger=logger, log_every_n_steps=1)
        logged.append(monitor.lrs)
    assert sorted(logged[0]) == sorted(logged[1]) == ["lr-AdamW/in", "lr-AdamW/pg2"]
    assert_same(*logged)


def test_averages_of_weights_at_the_end() -> None:
    def configured(library: Any) -> Callable[[nn.Module], Any]:
        def configure(model: nn.Module) -> Any:
            optimizer = adamw(library, model)
            return [optimizer], [library.lr_scheduler.StepLR(optimizer, 1)]

        return configure

    runs = [
        rates_and_weights(
            configured(library),
            callbacks=[StochasticWeightAveraging(5e-3, swa_epoch_start=2, annealing_epochs=2)],
            max_epochs=5,
        )
        for library in LIBRARIES
    ]
    assert_same(*runs)


def test_accumulation_that_changes() -> None:
    runs = [
        rates_and_weights(
            lambda model, library=library: adamw(library, model),
            callbacks=[GradientAccumulationScheduler({0: 2, 1: 1})],
        )
        for library in LIBRARIES
    ]
    assert_same(*runs)


class Two(Module):
    """Two optimizers, with a schedule for each, by hand."""

    def __init__(self, library: Any) -> None:
        super().__init__(lambda model: None)
        self.automatic_optimization = False
        self.library = library
        self.steps = 0

    def configure_optimizers(self) -> Any:
        head, body = self.network[3], self.network[:3]
        first = self.library.AdamW(head.parameters(), lr=1e-2)
        second = self.library.SGD(body.parameters(), lr=1e-2, momentum=0.9)
        schedules = self.library.lr_scheduler
        return [first, second], [
            schedules.StepLR(first, 2),
            schedules.OneCycleLR(second, 0.1, total_steps=20),
        ]

    def training_step(self, batch: Any, index: int) -> None:
        first, second = self.optimizers()
        for optimizer, schedule in zip((first, second), self.lr_schedulers(), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            schedule.step()
        with first.toggle_model():
            first.step(closure=self.closure(first, batch))
        self.steps += 1

    def closure(self, optimizer: Any, batch: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        return closure


def test_optimization_by_hand() -> None:
    modules = [Two(library) for library in LIBRARIES]
    for module in modules:
        fit(module)
    assert_same(*map(weights, modules))


class Looked(Module):
    """A module that uses `self.optimizers()` as users do."""

    def on_train_epoch_end(self) -> None:
        wrapped, inner = self.optimizers(), self.optimizers(use_pl_optimizer=False)
        assert isinstance(wrapped, stepwell.AdamW)
        assert wrapped.param_groups is inner.param_groups
        assert wrapped.state is inner.state
        assert wrapped.defaults is inner.defaults
        assert_identical(inner.state_dict(), wrapped.state_dict())
        assert repr(wrapped).startswith("LightningAdamW (\nParameter Group 0")
        wrapped.load_state_dict(wrapped.state_dict())
        assert wrapped.state_bytes() == inner.state_bytes() > 0
        wrapped.init_state()
        wrapped.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert len(inner.param_groups) == 2
        del inner.param_groups[1]
        wrapped.zero_grad()
        wrapped.zero_grad(set_to_none=False)
        stepwell.lr_scheduler.StepLR(wrapped, 1)
        copied = pickle.loads(pickle.dumps(inner))
        assert_identical([*copied.state.values()], [*inner.state.values()])


def test_the_wrapper_is_the_optimizer() -> None:
    module = Looked(lambda model: stepwell.AdamW(model.parameters(), lr=1e-2))
    fit(module)
    assert_identical(plainly_trained(stepwell, lr=1e-2), weights(module))


@pytest.mark.parametrize("schedule", [False, True], ids=["no schedule", "a schedule"])
def test_hooks_run_once_for_each_step(schedule: bool) -> None:
    counts = {"pre": 0, "post": 0, "global": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    def configure(model: nn.Module) -> Any:
        optimizer = adamw(stepwell, model)
        optimizer.register_step_pre_hook(count("pre"))
        optimizer.register_step_post_hook(count("post"))
        if schedule:
            return [optimizer], [stepwell.lr_scheduler.StepLR(optimizer, 1)]
        return optimizer

    handle = register_optimizer_step_post_hook(count("global"))
    module = Module(configure)
    try:
        trainer = fit(module)
    finally:
        handle.remove()
    assert trainer.global_step == 8
    assert counts == {"pre": 8, "post": 8, "global": 8}


class Registers(Module):
    """Hooks on the wrapper are the optimizer's."""

    def on_train_start(self) -> None:
        self.seen = 0

        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.seen += 1

        self.optimizers().register_step_post_hook(hook)


def test_hooks_that_are_registered_on_the_wrapper() -> None:
    module = Registers(lambda model: adamw(stepwell, model))
    trainer = fit(module)
    assert module.seen == trainer.global_step == 8


@pytest.mark.parametrize("curve", ["StepLR", "OneCycleLR", "CosineAnnealingLR", "CyclicLR"])
@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_resume_is_to_the_bit(rule: str, curve: str, tmp_path: Path) -> None:
    def module() -> Module:
        def configure(model: nn.Module) -> Any:
            given = {"momentum": 0.9} if rule == "SGD" else {}
            optimizer = getattr(stepwell, rule)(model.parameters(), lr=1e-2, **given)
            schedule = getattr(stepwell.lr_scheduler, curve)(optimizer, **CURVES[curve])
            return forms(optimizer, schedule)["each step"]

        return Module(configure)

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    through, resumed = module(), module()
    fit(through, max_epochs=3, enable_checkpointing=True, callbacks=[saver])
    saved = tmp_path / "epoch=0.ckpt"
    fit(resumed, saved, max_epochs=3)
    assert_identical(weights(through), weights(resumed))

    content = torch.load(saved, weights_only=False)
    assert content["optimizer_states"][0]["state"]
    torch.save(content["optimizer_states"], tmp_path / "states.pt")
    assert torch.load(tmp_path / "states.pt", weights_only=True)


def test_a_checkpoint_of_torch_is_taken_up(tmp_path: Path) -> None:
    def module(library: Any) -> Module:
        def configure(model: nn.Module) -> Any:
            optimizer = adamw(library, model)
            return [optimizer], [library.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

        return Module(configure)

    saver = ModelCheckpoint(tmp_path, filename="half")
    through, resumed = module(torch.optim), module(stepwell)
    fit(module(torch.optim), max_epochs=1, enable_checkpointing=True, callbacks=[saver])
    for each in (through, resumed):
        fit(each, tmp_path / "half.ckpt", max_epochs=3)
    assert_same(weights(through), weights(resumed))


class Saves(Module):
    """Our own checkpoint from within a training, with what Lightning hands out."""

    def on_train_epoch_end(self) -> None:
        checkpoint.save(
            f"{self.current_epoch}.safetensors",
            model=self.network,
            optimizer=self.optimizers(),
            scheduler=self.lr_schedulers(),
        )


def test_our_own_checkpoint_of_a_wrapped_optimizer() -> None:
    def configure(model: nn.Module) -> Any:
        optimizer = stepwell.AdamW(model.named_parameters(), lr=1e-2)
        return [optimizer], [stepwell.lr_scheduler.StepLR(optimizer, 1)]

    module = Saves(configure)
    fit(module, max_epochs=1)
    model = network()
    optimizer = stepwell.AdamW(model.named_parameters(), lr=0.5)
    schedule = stepwell.lr_scheduler.StepLR(optimizer, 1)
    checkpoint.load("0.safetensors", model=model, optimizer=optimizer, scheduler=schedule)
    assert_identical(weights(module), weights(model))
    # saved before Lightning steps the schedule at the end of the epoch
    assert schedule.last_epoch in (0, 1)
    (first, *_) = model.parameters()
    assert optimizer.state[first]["step"] == 4


class Averaged(Module):
    """Validation with averaged weights, through the wrapper."""

    def on_validation_epoch_start(self) -> None:
        if self.trainer.sanity_checking:
            return
        self.seen = weights(self)
        self.exchange = stepwell.averaged_weights(self.optimizers())
        self.exchange.__enter__()
        self.averaged = weights(self)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        self.exchange.__exit__(None, None, None)
        assert_identical(self.seen, weights(self))


def test_averaged_weights_of_the_wrapper() -> None:
    def configure(model: nn.Module) -> Any:
        return stepwell.averaged(stepwell.AdamW)(model.parameters(), lr=1e-2, average_decay=0.5)

    module = Averaged(configure)
    fit(module)
    assert any(not torch.equal(a, b) for a, b in zip(module.seen, module.averaged, strict=True))
