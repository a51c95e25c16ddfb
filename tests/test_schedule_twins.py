"""Is every schedule torch's own over 1,000 steps, and does each go on from the other's state?"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

import stepwell
from stepwell import lr_scheduler

from .schedule_cases import CASES, RATES, Case, optimizer

# torch multiplies 1,000 times: 1e-16 each, relative to the largest rate of the group, and to the
# floor towards which a group of rate zero rises
CHAINED = 1e-12

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter")


def twins(case: Case, kind: Any = torch.optim.SGD) -> list[Any]:
    """torch's schedule and stepwell's, each on an optimizer of its own."""
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    made = [
        case.make(module, optimizer(*RATES, kind=kind, **more))
        for module in (torch_schedulers, lr_scheduler)
    ]
    for scheduler in made:
        scheduler.optimizer.step()
    return made


def held(scheduler: Any) -> list[float]:
    """The rates of the groups, and what else a schedule may set."""
    groups = scheduler.optimizer.param_groups
    others = [g["momentum"] if "momentum" in g else g["betas"][0] for g in groups]
    assert [group["lr"] for group in groups] == scheduler.get_last_lr()
    return [*(group["lr"] for group in groups), *others]


def advance(*schedulers: Any) -> None:
    for scheduler in schedulers:
        scheduler.step()


def alike(ours: Any, torchs: Any) -> None:
    assert held(ours) == pytest.approx(held(torchs), rel=CHAINED, abs=CHAINED)


CYCLING = ("CyclicLR", "OneCycleLR")
KINDS = [(case, torch.optim.SGD) for case in CASES]
KINDS += [(case, torch.optim.AdamW) for case in CASES if case.name in CYCLING]


@pytest.mark.parametrize(("case", "kind"), KINDS, ids=lambda value: getattr(value, "label", ""))
def test_a_thousand_steps(case, kind):
    torchs, ours = twins(case, kind)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for _ in range(min(1000, case.last or 1000)):
        alike(ours, torchs)
        advance(torchs, ours)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.arguments.get("gamma") != 0],
    ids=lambda case: case.label,
)
def test_rates_changed_by_hand_in_between(case):
    torchs, ours = twins(case)
    for step in range(120):
        if step in (2, 17, 90):
            for scheduler in (torchs, ours):
                scheduler.optimizer.param_groups[0]["lr"] *= 0.77
                scheduler.optimizer.param_groups[1]["lr"] = 0.2
        else:
            alike(ours, torchs)
        advance(torchs, ours)


CLOSED = [
    case
    for case in CASES
    if hasattr(getattr(torch_schedulers, case.name, None), "_get_closed_form_lr")
]


@pytest.mark.parametrize("case", CLOSED, ids=lambda case: case.label)
def test_the_closed_form_at_any_epoch(case):
    torchs, ours = twins(case)
    for epoch in (5, 0, 700, 699, 3, 2500):
        for scheduler in (torchs, ours):
            scheduler.step(epoch)
        alike(ours, torchs)


@pytest.mark.parametrize("case", CLOSED, ids=lambda case: case.label)
def test_ours_is_the_closed_form_to_the_bit_at_every_step(case):
    _, ours = twins(case)
    for _ in range(300):
        assert ours.get_last_lr() == ours._get_closed_form_lr()
        advance(ours)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("stop", [1, 103])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_state_is_exchanged(case, stop, ours_first):
    source, target = twins(case)[:: -1 if ours_first else 1]
    for _ in range(stop):
        advance(source)
    target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for _ in range(40):
        advance(source, target)
        alike(source, target)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_tensor_rates_are_filled_in_place(case, shape):
    rates = [torch.full(shape, rate, dtype=torch.float64) for rate in RATES]
    torchs, ours = (
        case.make(module, optimizer(*(rate.clone() for rate in rates), momentum=0.9))
        for module in (torch_schedulers, lr_scheduler)
    )
    torchs.optimizer.step()
    ours.optimizer.step()
    tensors = [group["lr"] for group in ours.optimizer.param_groups]
    for _ in range(30):
        numbers = [[float(g["lr"]) for g in s.optimizer.param_groups] for s in (ours, torchs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=CHAINED)
        assert all(last is not rate for last, rate in zip(ours.get_last_lr(), tensors, strict=True))
        advance(torchs, ours)
    assert all(g["lr"] is t for g, t in zip(ours.optimizer.param_groups, tensors, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_on_our_optimizers(case):
    plain, checked = (
        case.make(lr_scheduler, optimizer(*RATES, kind=library.SGD, momentum=0.9))
        for library in (torch.optim, stepwell)
    )
    plain.optimizer.step()
    checked.optimizer.step()
    for _ in range(50):
        assert held(checked) == held(plain)
        advance(plain, checked)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_torchs_schedules_work_on_our_optimizers(case):
    more = {"kind": stepwell.SGD, "momentum": 0.9}
    torchs, ours = (
        case.make(m, optimizer(*RATES, **more)) for m in (torch_schedulers, lr_scheduler)
    )
    torchs.optimizer.step()
    ours.optimizer.step()
    for _ in range(50):
        alike(ours, torchs)
        advance(torchs, ours)


def metrics() -> list[float]:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (values * 0.1 + torch.linspace(3, 1, 1000)).tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "max", "factor": 0.5, "patience": 3, "cooldown": 4},
        {"threshold_mode": "abs", "threshold": 0.1, "patience": 0, "min_lr": [0.1, 0.0, 2.0]},
        {"mode": "max", "threshold_mode": "abs", "factor": 0.9, "patience": 1, "eps": 0.01},
    ],
)
@pytest.mark.parametrize("swap", [None, 77])
def test_plateau(arguments, swap):
    case = Case("ReduceLROnPlateau", arguments)
    torchs, ours = twins(case)
    assert isinstance(ours, torch_schedulers.ReduceLROnPlateau)
    for step, metric in enumerate(metrics()):
        for scheduler in (torchs, ours):
            scheduler.step(metric)
        alike(ours, torchs)
        assert ours.state_dict() == torchs.state_dict()
        if step == swap:
            states = [copy.deepcopy(scheduler.state_dict()) for scheduler in (torchs, ours)]
            torchs.load_state_dict(states[1])
            ours.load_state_dict(states[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_nothing_warns_in_an_ordinary_loop(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, ours = twins(case)
        for _ in range(5):
            advance(ours)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_preview_is_what_comes_and_moves_nothing(case):
    _, ours = twins(case)
    for _ in range(4):
        advance(ours)
    before = copy.deepcopy((ours.state_dict(), ours.optimizer.state_dict()))
    seen = ours.preview(30)
    assert (ours.state_dict(), ours.optimizer.state_dict()) == before
    for rates in seen:
        assert held(ours)[: len(rates)] == rates
        advance(ours)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_copies_and_files_that_hold_no_code_go_on(case, tmp_path):
    _, ours = twins(case)
    for _ in range(4):
        advance(ours)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    with torch.serialization.safe_globals([Counter]):
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded == ours.state_dict()
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for _ in range(9):
        advance(ours, *copies)
        assert [held(made) for made in copies] == [held(ours)] * 2
