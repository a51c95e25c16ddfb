"""LightningCLI: which names of classes it understands, once stepwell is imported."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn

import stepwell

from .training import batches, network


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.training_step(batch, index))


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches()

    def val_dataloader(self) -> Any:
        return batches()


class StepwellCLI(LightningCLI):
    """Short names are stepwell's."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_optimizer_args((stepwell.Optimizer,))
        parser.add_lr_scheduler_args((stepwell.lr_scheduler.LRScheduler,))


def run(cli: type[LightningCLI], *arguments: str) -> Any:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    made = cli(
        Module, Data, args=["fit", *arguments], trainer_defaults=quiet, save_config_callback=None
    )
    (optimizer,), (schedule,) = made.trainer.optimizers, made.trainer.lr_scheduler_configs
    return optimizer, schedule.scheduler


SHORT = ["--optimizer=AdamW", "--lr_scheduler=StepLR"]
WHOLE = ["--optimizer=stepwell.AdamW", "--lr_scheduler=stepwell.lr_scheduler.StepLR"]
OPTIONS = ["--optimizer.lr=0.5", "--optimizer.betas=[0.5, 0.6]", "--lr_scheduler.step_size=1"]


@pytest.mark.parametrize(
    ("cli", "names"), [(LightningCLI, WHOLE), (StepwellCLI, WHOLE), (StepwellCLI, SHORT)]
)
def test_a_name_is_understood(cli: type[LightningCLI], names: list[str]) -> None:
    optimizer, schedule = run(cli, *names, *OPTIONS)
    assert type(optimizer) is stepwell.AdamW
    assert type(schedule) is stepwell.lr_scheduler.StepLR
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.5, 0.6)
    assert group["initial_lr"] == 0.5
    assert group["lr"] == pytest.approx(0.005)


def test_a_short_name_that_torch_has_too_is_refused_with_both(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(LightningCLI, *SHORT, *OPTIONS)
    assert "torch.optim.AdamW, stepwell.AdamW" in capsys.readouterr().err


def test_lightnings_own_plateau_drives_our_optimizer() -> None:
    optimizer, schedule = run(
        LightningCLI,
        "--optimizer=stepwell.AdamW",
        "--lr_scheduler=pytorch_lightning.cli.ReduceLROnPlateau",
        "--lr_scheduler.monitor=loss",
        "--lr_scheduler.threshold=0.9",
        "--lr_scheduler.patience=0",
    )
    assert isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
