"""timm: its factory with our classes, its schedulers and its Lookahead with our optimizers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lookahead, OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PlateauLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
    create_scheduler_v2,
)
from torch import nn

import stepwell

from .training import LIBRARIES, assert_identical, assert_same, batches, network, weights

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"has_betas": True}),
    "sgd": ("SGD", {"has_eps": False, "has_momentum": True, "defaults": {"nesterov": True}}),
    "rmsprop": ("RMSprop", {"has_momentum": True, "defaults": {"alpha": 0.9}}),
    "nadamw": ("NAdam", {"has_betas": True, "defaults": {"decoupled_weight_decay": True}}),
    "adadelta": ("Adadelta", {}),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm knows stepwell's classes by the names of the table and a prefix, and torch's as well."""
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    for name, (rule, facts) in RULES.items():
        default_registry.register(OptimInfo(f"stepwell{name}", f"stepwell.{rule}", **facts))
        default_registry.register(OptimInfo(f"torch{name}", getattr(torch.optim, rule), **facts))


def transformer() -> VisionTransformer:
    torch.manual_seed(0)
    # without biases of keys, whose gradients are nothing but noise
    return VisionTransformer(
        8, 4, embed_dim=16, depth=2, num_heads=2, num_classes=3, qkv_bias=False
    )


def train(
    model: nn.Module,
    optimizer: Any,
    epochs: int = 2,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    after_update: Callable[[int], None] = lambda update: None,
) -> list[float]:
    """The loop of timm's train.py, as far as an optimizer sees it."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 3
    losses, update = [], 0
    for epoch in range(epochs):
        for start in (0, 4):
            optimizer.zero_grad()
            output = model(images[start : start + 4])
            loss = nn.functional.cross_entropy(output, labels[start : start + 4])
            loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
            optimizer.step()
            update += 1
            after_update(update)
            losses.append(loss.item())
        after_epoch(epoch + 1)
    return losses


@pytest.mark.parametrize("prefix", ["", "lookahead_"], ids=["plain", "Lookahead"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "layer_decay": 0.5}, {"foreach": True}],
    ids=["defaults", "decay", "layer decay", "foreach"],
)
@pytest.mark.parametrize("rule", RULES)
def test_the_factory(rule: str, options: dict[str, Any], prefix: str) -> None:
    losses = []
    for library in ("torch", "stepwell"):
        model = transformer()
        optimizer = create_optimizer_v2(model, f"{prefix}{library}{rule}", lr=1e-2, **options)
        losses.append(train(model, optimizer, epochs=4))
        if "layer_decay" in options:
            assert len(optimizer.param_groups) > 2
    assert_same(*losses, rtol=1e-4)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: CosineLRScheduler(o, 6, warmup_t=2, warmup_lr_init=1e-4, cycle_limit=2),
    "step": lambda o: StepLRScheduler(o, 2, 0.5, warmup_t=1),
    "many steps": lambda o: MultiStepLRScheduler(o, [2, 4], 0.5),
    "polynomial": lambda o: PolyLRScheduler(o, 6, k_decay=0.5),
    "tanh": lambda o: TanhLRScheduler(o, 6),
    "each update": lambda o: CosineLRScheduler(o, 12, t_in_epochs=False, warmup_t=3),
    "noise": lambda o: StepLRScheduler(o, 2, 0.5, noise_range_t=1),
    "plateau": lambda o: PlateauLRScheduler(o, patience_t=0, mode="min", warmup_t=1),
    "the factory's": lambda o: create_scheduler_v2(o, "cosine", num_epochs=6, warmup_epochs=2)[0],
}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_timm(name: str, layer_decay: float | None) -> None:
    runs = []
    for library in ("torch", "stepwell"):
        model = transformer()
        optimizer = create_optimizer_v2(model, f"{library}adamw", 1e-2, layer_decay=layer_decay)
        scheduler = SCHEDULERS[name](optimizer)
        rates: list[list[float]] = []

        def after_update(update: int, scheduler: Any = scheduler) -> None:
            scheduler.step_update(num_updates=update, metric=1.0)

        def after_epoch(
            epoch: int, scheduler: Any = scheduler, rates: Any = rates, optimizer: Any = optimizer
        ) -> None:
            scheduler.step(epoch, 1.0)
            rates.append([group["lr"] for group in optimizer.param_groups])

        losses = train(model, optimizer, 6, after_epoch, after_update)
        runs.append((losses, rates))
    assert len({rates[0] for rates in runs[1][1]}) > 1
    assert_same(*runs, rtol=1e-4)


@pytest.mark.parametrize("curve", ["CosineAnnealingLR", "OneCycleLR", "LinearLR"])
def test_our_schedules_on_optimizers_of_the_factory(curve: str) -> None:
    given: dict[str, Any] = {
        "CosineAnnealingLR": {"T_max": 4},
        "OneCycleLR": {"max_lr": 0.02, "total_steps": 5},
        "LinearLR": {},
    }
    runs = []
    for name, library in zip(("torch", "stepwell"), LIBRARIES, strict=True):
        model = transformer()
        optimizer = create_optimizer_v2(model, f"lookahead_{name}adamw", lr=1e-2)
        schedule = getattr(library.lr_scheduler, curve)(optimizer, **given[curve])
        losses = train(model, optimizer, 4, lambda epoch, schedule=schedule: schedule.step())
        runs.append((losses, optimizer.param_groups[0]["lr"]))
    assert_same(*runs, rtol=1e-4)


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_lookahead_goes_on_to_the_bit(rule: str) -> None:
    """Its slow weights are in the state of the optimizer inside, its counters in the groups."""
    given: dict[str, Any] = {"lr": 1e-2} | ({"momentum": 0.9} if rule == "SGD" else {})

    def made(model: nn.Module) -> Lookahead:
        return Lookahead(getattr(stepwell, rule)(model.parameters(), **given), k=3)

    def step(model: nn.Module, optimizer: Any) -> None:
        for inputs, labels in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    model = network()
    optimizer = made(model)
    step(model, optimizer)
    saved = deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer)
    optimizer.sync_lookahead()

    other = network()
    other.load_state_dict(saved[0])
    resumed = made(other)
    resumed.load_state_dict(saved[1])
    step(other, resumed)
    resumed.sync_lookahead()
    assert_identical(weights(model), weights(other))


def test_a_combined_optimizer_in_its_loop_with_its_scheduler() -> None:
    """Muon for matrices and AdamW for the rest, as two optimizers of torch beside each other."""
    losses = []
    for library in LIBRARIES:
        model = transformer()
        hidden = [param for param in model.blocks.parameters() if param.dim() == 2]
        others = [param for param in model.parameters() if all(param is not p for p in hidden)]
        parts = [library.Muon(hidden, lr=1e-2), library.AdamW(others, lr=1e-3)]
        if library is torch.optim:
            schedulers = [CosineLRScheduler(part, 4, warmup_t=1) for part in parts]
            optimizer: Any = Both(parts)
        else:
            optimizer = stepwell.Combined(dict(zip(("muon", "adamw"), parts, strict=True)))
            schedulers = [CosineLRScheduler(optimizer, 4, warmup_t=1)]

        def after_epoch(epoch: int, schedulers: Any = schedulers) -> None:
            for scheduler in schedulers:
                scheduler.step(epoch)

        losses.append(train(model, optimizer, 4, after_epoch))
    # Muon multiplies in bfloat16
    assert_same(*losses, rtol=1e-2)


class Both:
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()
