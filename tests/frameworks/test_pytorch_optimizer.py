"""kozistr's pytorch_optimizer: its wrappers around optimizers of stepwell.

Most of them are subclasses of Optimizer that never call its constructor; they share groups and
state with the optimizer inside, and write entries of their own into both.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from pytorch_optimizer import (
    GSAM,
    SAM,
    TRAC,
    WSAM,
    FriendlySAM,
    Lookahead,
    LookSAM,
    OrthoGrad,
    PCGrad,
    ScheduleFreeWrapper,
)
from pytorch_optimizer.lr_scheduler import ProportionScheduler
from torch import Tensor, nn

from .training import CURVES, LIBRARIES, assert_identical, assert_same, batches, network, weights

RULES: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2},
    "SGD": {"lr": 1e-2, "momentum": 0.9},
    "RAdam": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
}

Make = Callable[[nn.Module, Any, dict[str, Any]], Any]


def around(wrapper: Any, **options: Any) -> Make:
    return lambda model, rule, given: wrapper(rule(model.parameters(), **given), **options)


def inside(wrapper: Any, **options: Any) -> Make:
    return lambda model, rule, given: wrapper(model.parameters(), rule, **options, **given)


def gsam(model: nn.Module, rule: Any, given: dict[str, Any]) -> Any:
    base = rule(model.parameters(), **given)
    schedule = torch.optim.lr_scheduler.LinearLR(base, 1.0, 1.0)
    rho = ProportionScheduler(schedule, max_lr=0.1, min_lr=0.0, max_value=0.1, min_value=0.01)
    return GSAM(model.parameters(), base, model, rho)


WRAPPERS: dict[str, Make] = {
    "Lookahead": around(Lookahead, k=3),
    "Lookahead, pullback": around(Lookahead, k=3, pullback_momentum="pullback"),
    "ScheduleFreeWrapper": around(ScheduleFreeWrapper, momentum=0.9),
    "OrthoGrad": around(OrthoGrad),
    "PCGrad": around(PCGrad),
    "TRAC": around(TRAC),
    "SAM": inside(SAM, rho=0.05),
    "SAM, adaptive": inside(SAM, rho=0.5, adaptive=True),
    "LookSAM": inside(LookSAM, k=3),
    "FriendlySAM": inside(FriendlySAM),
    "WSAM": lambda model, rule, given: WSAM(model, model.parameters(), rule, **given),
    "GSAM": gsam,
}


def train(wrapper: Any, model: nn.Module, schedule: Any = None, epochs: int = 3) -> list[Tensor]:
    if hasattr(wrapper, "train"):
        wrapper.train()
    for _ in range(epochs):
        for inputs, labels in batches():

            def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                wrapper.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                return loss

            if isinstance(wrapper, GSAM):
                wrapper.set_closure(nn.functional.cross_entropy, inputs, labels)
                wrapper.step()
            elif isinstance(wrapper, PCGrad):
                wrapper.zero_grad()
                rows = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
                wrapper.pc_backward([rows[::2].mean(), rows[1::2].mean()])
                wrapper.step()
            else:
                closure()
                wrapper.step(closure)
            if schedule is not None:
                schedule.step()
    return weights(model)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_trains_as_around_torch(name: str, rule: str) -> None:
    ends = []
    for library in LIBRARIES:
        model = network()
        torch.manual_seed(0)
        ends.append(train(WRAPPERS[name](model, getattr(library, rule), RULES[rule]), model))
    assert_same(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_can_be_printed(name: str) -> None:
    model = network()
    wrapper = WRAPPERS[name](model, LIBRARIES[1].AdamW, RULES["AdamW"])
    assert repr(wrapper)
    train(wrapper, model, epochs=1)
    assert "Parameter Group 0" in torch.optim.Optimizer.__repr__(wrapper)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(
    "name", ["Lookahead", "OrthoGrad", "TRAC", "PCGrad", "ScheduleFreeWrapper"]
)
def test_our_schedule_of_a_wrapper(name: str, curve: str) -> None:
    ends = []
    for library in LIBRARIES:
        model = network()
        wrapper = WRAPPERS[name](model, library.AdamW, RULES["AdamW"])
        schedule = getattr(library.lr_scheduler, curve)(wrapper, **CURVES[curve])
        end = train(wrapper, model, schedule)
        ends.append((end, schedule.get_last_lr(), wrapper.param_groups[0]["lr"]))
    assert_same(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
@pytest.mark.parametrize("name", [name for name in WRAPPERS if name not in ("GSAM", "PCGrad")])
def test_a_loaded_wrapper_goes_on_to_the_bit(name: str, rule: str) -> None:
    """From its state dict, with what the wrapper wrote into the state of the optimizer inside."""

    def made() -> tuple[Any, nn.Module]:
        model = network()
        torch.manual_seed(0)
        return WRAPPERS[name](model, getattr(LIBRARIES[1], rule), RULES[rule]), model

    through, model = made()
    train(through, model, epochs=1)
    saved = deepcopy((through.state_dict(), model.state_dict()))
    end = train(through, model)
    resumed, other = made()
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    assert_identical(end, train(resumed, other))
