"""Are the values of a schedule its own: no Tensor shared, no class that a file may not hold?"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

import stepwell
from stepwell import lr_scheduler
from stepwell.lr_scheduler import Schedule, absolute, cosine, linear

from .schedule_cases import CASES, RATES, Case, optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")

CYCLES = [
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 2}),
    ("OneCycleLR", {"max_lr": 0.2, "total_steps": 9}),
]


def loaded_without_code(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All Tensors within lists, dicts and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("library", [torch.optim, stepwell])
@pytest.mark.parametrize(("case", "arguments"), CYCLES)
def test_momenta_given_as_tensors_are_torchs_momenta(case, arguments, library, name):
    def run(library: Any, schedules: Any, kind: Any) -> list[float]:
        more = {"momentum": 0.9} if name == "SGD" else {}
        held = optimizer(0.1, kind=getattr(library, name), **more)
        momenta = {"base_momentum": kind(0.8), "max_momentum": kind(0.9)}
        schedule = getattr(schedules, case)(held, **arguments, **momenta)
        seen = []
        for _ in range(8):
            group = held.param_groups[0]
            seen.append(float(group["betas"][0] if name == "AdamW" else group["momentum"]))
            schedule.step()
        assert [float(value) for value in momenta.values()] == pytest.approx([0.8, 0.9])
        return seen

    theirs = run(torch.optim, torch_schedulers, float)
    assert run(library, lr_scheduler, torch.tensor) == pytest.approx(theirs, rel=1e-6)


TENSORS = [
    *[
        (name, {**arguments, "base_momentum": 0.8, "max_momentum": 0.9})
        for name, arguments in CYCLES
    ],
    ("CosineAnnealingLR", {"T_max": 4, "eta_min": 0.1}),
    ("SWALR", {"swa_lr": 0.2, "anneal_epochs": 2}),
    ("ReduceLROnPlateau", {"min_lr": 0.3, "patience": 0}),
    ("StepLR", {"step_size": 1, "gamma": 0.5}),
]


@pytest.mark.parametrize("betas", [False, True])
@pytest.mark.parametrize("rates", [float, torch.tensor])
@pytest.mark.parametrize("library", [torch.optim, stepwell])
@pytest.mark.parametrize(("name", "arguments"), TENSORS)
def test_no_group_shares_a_tensor_with_anybody(name, arguments, library, rates, betas):
    given = {
        key: torch.tensor(value) if isinstance(value, float) else value
        for key, value in arguments.items()
    }
    before = copy.deepcopy(given)
    more = {"betas": (torch.tensor(0.9), torch.tensor(0.99))} if betas else {"momentum": 0.9}
    kind = library.Adam if betas else library.SGD
    if betas:
        more["foreach" if library is stepwell else "capturable"] = library is not stepwell
    held = optimizer(rates(0.5), rates(0.5), kind=kind, **more)
    schedule = getattr(lr_scheduler, name)(held, **given)
    seen: list[Any] = []
    for _ in range(4):
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        seen.append(schedule.get_last_lr())
        state = schedule.state_dict()
        groups = [[g[key] for key in g if key != "params"] for g in held.param_groups]
        ours = {id(tensor) for tensor in tensors(groups)}
        own = {key: value for key, value in vars(schedule).items() if key != "optimizer"}
        for others in (given, state, own, seen):
            assert not ours & {id(tensor) for tensor in tensors(others)}
    assert given == before
    copied = copy.deepcopy(state)
    schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert state == copied


def of_numpy(value: Any) -> Any:
    """The value, with numbers of NumPy in place of Python's."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(of_numpy, value))
    if type(value) is dict:
        return {key: of_numpy(item) for key, item in value.items()}
    kind: Any = {bool: np.bool_, int: np.int64, float: np.float64}.get(type(value))
    return value if kind is None else kind(value)


def kinds(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return list(map(kinds, value))
    return {k: kinds(v) for k, v in value.items()} if isinstance(value, dict) else type(value)


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_whole_numbers_and_others_of_numpy_are_pythons(case: Case) -> None:
    """As arguments, as epochs and in states."""
    plain = case.make(lr_scheduler, optimizer(*RATES, momentum=0.9))
    case = dataclasses.replace(case, arguments=of_numpy(case.arguments))
    schedule = case.make(lr_scheduler, optimizer(*RATES, momentum=0.9))
    for _ in range(2):
        plain.step()
        schedule.step()
    if case.parts is None:
        plain.step(3)
        schedule.step(np.int64(3))
    for _ in range(2):
        state = schedule.state_dict()
        assert kinds(state) == kinds(plain.state_dict())
        assert loaded_without_code(state) == state
        schedule = case.make(lr_scheduler, optimizer(*RATES, momentum=0.9))
        schedule.load_state_dict(of_numpy(state))


@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_numbers_of_numpy_in_a_plateau_are_pythons() -> None:
    arguments = {"factor": 0.5, "patience": 2, "threshold": 0.1, "cooldown": 1, "eps": 0.1}
    plain = lr_scheduler.ReduceLROnPlateau(optimizer(0.5), **arguments, last_epoch=3)
    given = of_numpy({**arguments, "last_epoch": 3})
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer(0.5), **given)
    for each, number in ((plain, int), (schedule, np.int64)):
        each.step(1.0, number(5))
    schedule.load_state_dict(of_numpy(schedule.state_dict()))
    assert kinds(vars(schedule)) == kinds(vars(plain))
    assert loaded_without_code(schedule.state_dict()) == plain.state_dict()


@pytest.mark.parametrize("library", [torch.optim, stepwell])
def test_a_loaded_dict_stays_the_users(library):
    whole = lr_scheduler.CosineAnnealingLR(optimizer(torch.tensor(0.5), kind=library.SGD), 5)
    whole.step()
    state = whole.state_dict()
    before = copy.deepcopy(state)
    other = lr_scheduler.CosineAnnealingLR(optimizer(torch.tensor(0.5), kind=library.SGD), 5)
    other.load_state_dict(state)
    for _ in range(3):
        other.step()
    assert state == before


def test_lists_and_dicts_that_were_given_stay_the_users():
    held = optimizer(1.0, 1.0)
    drivers = [linear(1, 0, 4), None]
    curves = Schedule(held, lr=drivers)
    parts = [lr_scheduler.ConstantLR(held, 0.5), lr_scheduler.ExponentialLR(held, 0.5)]
    milestones = [2]
    sequence = lr_scheduler.SequentialLR(held, parts, milestones)
    expected = curves.preview(5), sequence.preview(5)
    drivers[0] = linear(1, 5, 4)
    milestones[0] = 4
    parts.reverse()
    assert (curves.preview(5), sequence.preview(5)) == expected


class TestFiles:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
    def test_what_users_save_of_a_schedule(self, case):
        held = optimizer(*RATES, kind=stepwell.SGD, momentum=0.9)
        schedule = case.make(lr_scheduler, held)
        for _ in range(3):
            state = schedule.state_dict()
            state.pop("lr_lambdas", None)
            saved = {
                "rates": schedule.get_last_lr(),
                "attribute": schedule._last_lr,
                "state": state,
                "base": getattr(schedule, "base_lrs", None),
                "preview": schedule.preview(3),
                "groups": [{**group, "params": []} for group in held.param_groups],
            }
            assert loaded_without_code(saved) == saved
            schedule.step()

    @pytest.mark.filterwarnings("ignore:To get the last")
    @pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR"])
    def test_rates_of_get_lr(self, name):
        schedule = getattr(lr_scheduler, name)(optimizer(1.0), 4)
        for _ in range(3):
            schedule.step()
            assert type(schedule.get_lr()) is list

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("StepLR", {"step_size": np.int64(2), "gamma": np.float32(0.5)}),
            ("MultiStepLR", {"milestones": np.array([1, 2]), "gamma": np.float64(0.5)}),
            ("CosineAnnealingLR", {"T_max": np.int64(5), "eta_min": np.float64(0.1)}),
            ("LambdaLR", {"lr_lambda": lambda step: np.float64(0.5)}),
            ("MultiplicativeLR", {"lr_lambda": lambda step: np.float64(0.5)}),
            ("CyclicLR", {"base_lr": np.float64(0.1), "max_lr": np.float64(1.0)}),
            ("OneCycleLR", {"max_lr": np.float64(0.1), "total_steps": 9}),
            ("SWALR", {"swa_lr": np.float64(0.1), "anneal_epochs": np.int64(2)}),
            ("ReduceLROnPlateau", {"min_lr": np.float64(0.1), "patience": np.int64(0)}),
        ],
    )
    def test_numbers_of_numpy_are_plain_numbers_in_files(self, name, arguments):
        held = optimizer(np.float64(0.5), momentum=0.9)
        schedule = getattr(lr_scheduler, name)(held, **arguments)
        for _ in range(3):
            schedule.step(*([np.float64(1.0)] if name == "ReduceLROnPlateau" else []))
            state = {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"}
            saved = [schedule.get_last_lr(), state]
            assert loaded_without_code(saved) == saved


class TestDefaultDevice:
    """Constants are made on the device of the rate, not on the default one."""

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
    def test_tensor_rates_under_another_one(self, case):
        expected = self.rates(case)
        with torch.device("meta"):
            assert self.rates(case) == expected

    def test_tensors_that_are_arguments(self):
        values = {"T_max": 5, "eta_min": torch.tensor(0.1)}
        expected = self.rates(Case("CosineAnnealingLR", values))
        with torch.device("meta"):
            assert self.rates(Case("CosineAnnealingLR", values)) == expected

    def test_curves(self):
        def values() -> list[float]:
            held = optimizer(torch.tensor(0.5, device="cpu"), momentum=0.9)
            schedule = Schedule(held, lr=cosine(5), momentum=absolute(linear(0.8, 0.9, 5)))
            for _ in range(3):
                schedule.step()
            held.param_groups[0]["lr"] *= 0.5
            schedule.step()
            return [float(held.param_groups[0]["lr"]), float(held.param_groups[0]["momentum"])]

        expected = values()
        with torch.device("meta"):
            assert values() == expected

    @staticmethod
    def rates(case: Any) -> list[float]:
        held = optimizer(*(torch.tensor(rate, device="cpu") for rate in RATES), momentum=0.9)
        schedule = case.make(lr_scheduler, held)
        for _ in range(3):
            schedule.step()
        held.param_groups[0]["lr"] *= 0.5
        schedule.step()
        state = schedule.state_dict()
        other = case.make(lr_scheduler, held)
        other.load_state_dict(state)
        other.step()
        return [float(rate) for rate in other.get_last_lr()]
