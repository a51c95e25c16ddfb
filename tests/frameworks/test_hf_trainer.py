"""transformers' Trainer: the ways to give it an optimizer and a schedule, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import stepwell

from .training import CURVES, LIBRARIES, assert_identical, assert_same, data, network, weights


class Rows(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return len(data())

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, label = data()[index]
        return {"inputs": inputs, "labels": label}


class Tokens(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Classifier(PreTrainedModel):
    config_class = PreTrainedConfig
    main_input_name = "inputs"

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.network = network()

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.network(inputs), labels)}


class OnlyMatrices(nn.Module):
    """Nothing that is left without decay: the Trainer's second group is empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8, bias=False)
        self.second = nn.Linear(8, 3, bias=False)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.second(self.first(inputs)), labels)}


def language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, int] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **sizes)
    )


def arguments(**options: Any) -> TrainingArguments:
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    usual: dict[str, Any] = {
        "output_dir": "out",
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(**quiet | usual | options)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def trained(
    model: nn.Module,
    dataset: Dataset[Any] | None = None,
    resume: str | None = None,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    trainer = Trainer(model, arguments(**options), train_dataset=dataset or Rows(), **given or {})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("AdamW", {"lr": 1e-2, "betas": (0.9, 0.95)}),
        ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
        ("NAdam", {"lr": 1e-2}),
        ("Adafactor", {"lr": 1e-2}),
        ("RMSprop", {"lr": 1e-3, "momentum": 0.9, "centered": True}),
        ("Adagrad", {"lr": 1e-2}),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "max_grad_norm": 0.1,
            "gradient_accumulation_steps": 2,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "lr_scheduler_type": "cosine",
        },
    ],
    ids=["plain", "clipping, accumulation, decay, warm-up"],
)
def test_a_class_and_its_arguments(
    name: str, hyperparameters: dict[str, Any], options: dict[str, Any]
) -> None:
    runs = [
        trained(
            Classifier(),
            given={"optimizer_cls_and_kwargs": (getattr(library, name), hyperparameters)},
            **options,
        )
        for library in LIBRARIES
    ]
    assert_same(*[weights(trainer.model) for trainer in runs], rtol=1e-4, atol=1e-5)
    assert isinstance(runs[1].optimizer.optimizer, getattr(stepwell, name))


def test_a_language_model() -> None:
    """By its losses: the biases of its keys have no gradient but noise."""
    runs = [
        losses(
            trained(
                language_model(),
                Tokens(),
                given={"optimizer_cls_and_kwargs": (library.AdamW, {"lr": 1e-2})},
                max_grad_norm=0.5,
            )
        )
        for library in LIBRARIES
    ]
    assert_same(*runs, rtol=1e-3)


def test_the_second_group_may_be_empty() -> None:
    runs = [
        trained(OnlyMatrices(), given={"optimizer_cls_and_kwargs": (library.AdamW, {"lr": 1e-2})})
        for library in LIBRARIES
    ]
    assert [len(group["params"]) for group in runs[1].optimizer.param_groups] == [2, 0]
    assert_same(*[weights(trainer.model) for trainer in runs])


@pytest.mark.parametrize("curve", CURVES)
def test_an_optimizer_with_a_schedule(curve: str) -> None:
    """`optimizers=`: also ours with torch's schedule, and torch's with ours."""
    runs = {}
    for optim in LIBRARIES:
        for schedules in LIBRARIES:
            model = Classifier()
            optimizer = optim.AdamW(model.parameters(), lr=1e-2)
            schedule = getattr(schedules.lr_scheduler, curve)(optimizer, **CURVES[curve])
            trainer = trained(model, given={"optimizers": (optimizer, schedule)})
            rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
            runs[optim, schedules] = (rates, weights(model))
    theirs, *others = runs.values()
    assert len(set(theirs[0])) > 1
    for run in others:
        assert_same(theirs, run)


def test_a_schedule_on_the_metric() -> None:
    rates = []
    for library in LIBRARIES:
        model = Classifier()
        optimizer = library.AdamW(model.parameters(), lr=1e-2)
        schedule = library.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        trained(
            model,
            given={"optimizers": (optimizer, schedule), "eval_dataset": Rows()},
            eval_strategy="steps",
            eval_steps=2,
            metric_for_best_model="loss",
        )
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] < 1e-2
    assert_same(*rates)


@pytest.mark.parametrize(
    ("given", "curve"),
    [
        ("an optimizer", "CosineAnnealingLR"),
        ("an optimizer", "OneCycleLR"),
        ("an optimizer", "LambdaLR"),
        ("an optimizer", None),
        ("a class", None),
    ],
)
def test_resume_is_to_the_bit(given: str, curve: str | None, tmp_path: Path) -> None:
    """Without a curve of ours, the schedule is the Trainer's own."""

    def run(folder: str, resume: str | None = None, **options: Any) -> list[torch.Tensor]:
        model = Classifier()
        if given == "a class":
            keywords: dict[str, Any] = {
                "optimizer_cls_and_kwargs": (stepwell.AdamW, {"lr": 1e-2, "amsgrad": True})
            }
        else:
            optimizer = stepwell.AdamW(model.parameters(), lr=1e-2)
            schedule = None
            if curve is not None:
                schedule = getattr(stepwell.lr_scheduler, curve)(optimizer, **CURVES[curve])
            keywords = {"optimizers": (optimizer, schedule)}
        options |= {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / folder)}
        return weights(trained(model, resume=resume, given=keywords, **options).model)

    through = run("through")
    saved = tmp_path / "through" / "checkpoint-3"
    assert (saved / "optimizer.pt").exists()
    assert (saved / "scheduler.pt").exists()
    assert (saved / "model.safetensors").exists()
    assert_identical(through, run("resumed", resume=str(saved)))


def combined(model: nn.Module, lr: float = 1e-2) -> stepwell.Combined:
    hidden, others = stepwell.groups.muon_split(model)
    return stepwell.Combined(
        {"muon": stepwell.Muon(hidden, lr=lr), "adamw": stepwell.AdamW(others, lr=lr / 10)}
    )


class MakesCombined:
    """The Trainer calls what is no optimizer's class with the model."""

    def __call__(self, model: nn.Module, **options: Any) -> stepwell.Combined:
        return combined(model, **options)


@pytest.mark.parametrize("given", ["an optimizer", "a factory"])
def test_a_combined_optimizer(given: str, tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> list[torch.Tensor]:
        model = Classifier()
        if given == "a factory":
            keywords: dict[str, Any] = {"optimizer_cls_and_kwargs": (MakesCombined, {"lr": 1e-2})}
        else:
            optimizer = combined(model)
            schedule = stepwell.lr_scheduler.CosineAnnealingLR(optimizer, 8)
            keywords = {"optimizers": (optimizer, schedule)}
        options = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / folder)}
        trainer = trained(model, resume=resume, given=keywords, max_grad_norm=0.1, **options)
        assert trainer.optimizer.state
        return weights(model)

    through = run("through")
    assert_identical(through, run("resumed", resume=str(tmp_path / "through" / "checkpoint-3")))


def test_a_checkpoint_of_torch_is_taken_up(tmp_path: Path) -> None:
    """Half of a training with torch's AdamW, the rest with ours."""
    ends = []
    for second in LIBRARIES:
        halves = [(torch.optim, None), (second, str(tmp_path / "checkpoint-4"))]
        for library, resume in halves:
            model = Classifier()
            given = {"optimizer_cls_and_kwargs": (library.AdamW, {"lr": 1e-2})}
            options = {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path)}
            trained(model, given=given, resume=resume, **options)
        ends.append(weights(model))
    assert_same(*ends)


def test_bfloat16() -> None:
    runs = [
        trained(
            Classifier(),
            given={"optimizer_cls_and_kwargs": (library.AdamW, {"lr": 1e-2})},
            bf16=True,
        )
        for library in LIBRARIES
    ]
    assert_same(*[weights(trainer.model) for trainer in runs], rtol=1e-3, atol=1e-4)
