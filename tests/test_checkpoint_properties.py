"""Does a training that was saved and loaded at any step go on to the same bits?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stepwell
from stepwell.checkpoint import load, save
from stepwell.lr_scheduler import StepLR

from .cases import CASES, NATIVE, PLAIN, REQUESTS, Case, named, numbers
from .compare import assert_same_training
from .test_properties import DTYPES, SETTINGS, Training, trainings


@pytest.fixture(autouse=True, scope="module")
def _unsynced() -> Iterator[None]:
    # nothing here is about a loss of power, and syncs would take most of the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


class Weights(nn.Module):
    """Parameters as a model has them."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)


class Parts(NamedTuple):
    """What a checkpoint is of."""

    model: nn.Module
    optimizer: Any
    scheduler: Any


def made(training: Training, request: str) -> Parts:
    """The parts at the start."""
    params = training.params(permuted=True)
    options = {} if request == NATIVE else REQUESTS[request]
    optimizer = training.case.make(training.groups(params), **options)
    return Parts(Weights(params), optimizer, StepLR(optimizer, 2, gamma=0.5))


def assert_goes_on(
    make: Callable[[], Parts], step: Callable[[Parts, int], None], steps: int, stop: int, what: str
) -> None:
    """Save after `stop` steps, load into parts that were made anew, and go on with both."""
    parts, resumed = make(), make()
    # what is loaded into has gone its own way, but for the state, which it may lack
    for param in resumed.model.parameters():
        param.data.zero_()
    for number in range(stop):
        step(parts, number)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        save(path, **parts._asdict())
        load(path, **resumed._asdict())
    what = f"{what}, saved after step {stop}"
    assert_same_training(resumed.optimizer, parts.optimizer, f"{what}, as loaded")
    for each in (parts, resumed):
        for number in range(stop, steps):
            step(each, number)
    assert_same_training(resumed.optimizer, parts.optimizer, what)
    rates = [[float(g["lr"]) for g in each.optimizer.param_groups] for each in (resumed, parts)]
    assert rates[0] == rates[1], what


def assert_training_goes_on(training: Training, request: str, stop: int) -> None:
    """The same of parameters whose gradients are drawn."""

    def step(parts: Parts, number: int) -> None:
        training.set_grads(list(parts.model.parameters()), number, permuted=True)
        parts.optimizer.step()
        parts.scheduler.step()

    what = f"{training.case.name}, {training.dtype} on {request}"
    assert_goes_on(lambda: made(training, request), step, len(training.present), stop, what)


@pytest.mark.interpret
@SETTINGS
@given(trainings(), st.sampled_from(sorted(REQUESTS)), st.data())
def test_save_and_load_at_any_step(training: Training, request_: str, data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(training.present)), label="saved after")
    assert_training_goes_on(training, request_, stop)


# the first lies in another order of memory; one begins at the second step, one rests then
SHAPES = ((3, 4), (7,), ())
ORDERS = ((1, 0), (0,), ())
PRESENT = ((True, False, True), (True, True, False))

AVERAGED = [
    replace(case, name=f"averaged {case.name}", rule=stepwell.averaged(case.rule)) for case in PLAIN
]
ALL = (*CASES, *AVERAGED)


@pytest.mark.interpret
@pytest.mark.parametrize("case", **named(ALL))
def test_every_rule_and_flag_on_each_backend(case: Case) -> None:
    """Each in three precisions, saved after none, one or two steps."""
    for number, request in enumerate(sorted(REQUESTS), ALL.index(case)):
        dtypes = [dtype for dtype in DTYPES if case.takes(dtype)]
        dtype = dtypes[number % len(dtypes)]
        training = Training(case, dtype, SHAPES, ORDERS, cuts=(2,), present=PRESENT)
        assert_training_goes_on(training, request, number % 3)


def _sparse(params: Sequence[Tensor], number: int) -> None:
    for param in params:
        param.grad = numbers(param.shape, param.dtype, number).relu().to_sparse(1)


def _lbfgs(**options: Any) -> Callable[[Sequence[Tensor]], Any]:
    return lambda params: stepwell.LBFGS(params, history_size=2, max_iter=3, **options)


NO_FORMULA: dict[str, Callable[[Sequence[Tensor]], Any]] = {
    "LBFGS": _lbfgs(),
    "LBFGS(strong_wolfe)": _lbfgs(line_search_fn="strong_wolfe"),
    "Muon": stepwell.Muon,
    "Muon(nesterov=False)": lambda params: stepwell.Muon(params, nesterov=False),
    "Muon(momentum=0)": lambda params: stepwell.Muon(params, momentum=0.0),
    "Muon(match_rms_adamw)": lambda params: stepwell.Muon(params, adjust_lr_fn="match_rms_adamw"),
    "SparseAdam": stepwell.SparseAdam,
    "SparseAdam(maximize)": lambda params: stepwell.SparseAdam(params, maximize=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NO_FORMULA)
@pytest.mark.parametrize("stop", range(4))
def test_rules_that_are_no_formula(name: str, dtype: torch.dtype, stop: int) -> None:
    def make() -> Parts:
        model = Weights([nn.Parameter(numbers(shape, dtype, 1)) for shape in ((4, 3), (2, 5))])
        optimizer = NO_FORMULA[name](list(model.parameters()))
        return Parts(model, optimizer, StepLR(optimizer, 2, gamma=0.5))

    def step(parts: Parts, number: int) -> None:
        params = list(parts.model.parameters())

        def closure() -> float:
            for param in params:
                # of a sum of fourth powers, at a place that differs from step to step
                param.grad = 4 * (param.detach() - 0.1 * number) ** 3
            return float(sum(((param.detach() - 0.1 * number) ** 4).sum() for param in params))

        if "Sparse" in name:
            _sparse(params, number)
            parts.optimizer.step()
        else:
            parts.optimizer.step(closure)
        parts.scheduler.step()

    assert_goes_on(make, step, 4, stop, name)
