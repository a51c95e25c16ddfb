"""Does a schedule go on to the bit, in whatever order it and its optimizer are made and loaded?"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepwell
from stepwell import lr_scheduler
from stepwell.lr_scheduler import Schedule, absolute, constant, cosine, linear, warmup

from .schedule_cases import CASES, RATES, Case, optimizer

# the optimizers here take no steps
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")

# what happens on resuming; the optimizer's state goes in before or after the schedule is made, and
# before or after the schedule's own state, or only its step
MADE, OPTIMIZER, STATE, STEP = "schedule made", "optimizer loaded", "state loaded", "step given"
ORDERS = [
    order
    for what in (STATE, STEP)
    for order in itertools.permutations((MADE, OPTIMIZER, what))
    if order.index(MADE) < order.index(what)
]
BARE = [(MADE, STATE), (MADE, STEP)]


def schedule(held: Any, **more: Any) -> Schedule:
    """Curves on three hyperparameters, different ones for the groups."""
    return Schedule(
        held,
        lr=[warmup(5) >> cosine(60, end=0.1), None, constant(0.5, 9) >> linear(0.3, 2.0, 40)],
        momentum=absolute(linear(0.85, 0.95, 50)),
        weight_decay={0: cosine(30), 2: linear(1.0, 0.0, 20) * 0.5},
        **more,
    )


class Curves(Case):
    """`Schedule`, which torch does not have."""

    def make(self, module: Any, held: Any, **more: Any) -> Any:
        return schedule(held, **more)


ALL = (*CASES, Curves("Schedule"))


def make(library: Any) -> Any:
    return optimizer(*RATES, kind=library.SGD, momentum=0.9, weight_decay=0.1)


def advance(scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        scheduler.step()


def values(scheduler: Any) -> list[Any]:
    keys = ("lr", "momentum", "weight_decay")
    return [[group[key] for key in keys] for group in scheduler.optimizer.param_groups]


def resume(case: Case, saved: Any, order: tuple[str, ...], library: Any) -> Any:
    """A schedule on a new optimizer, brought to where another one stood."""
    optimizer_state, state, step = copy.deepcopy(saved)
    held, made = make(library), None
    for what in order:
        if what == MADE:
            made = case.make(lr_scheduler, held)
        elif what == OPTIMIZER:
            held.load_state_dict(optimizer_state)
        elif what == STATE:
            made.load_state_dict(state)
        else:
            made.load_state_dict({"last_epoch": step})
    return made


def check(case: Case, stop: int, order: tuple[str, ...], library: Any, by_hand: bool) -> None:
    whole = case.make(lr_scheduler, make(library))
    advance(whole, stop)
    if by_hand:
        whole.optimizer.param_groups[0]["lr"] *= 0.77
    saved = whole.optimizer.state_dict(), whole.state_dict(), whole.last_epoch
    resumed = resume(case, saved, order, library)
    assert resumed.last_epoch == stop
    for _ in range(9):
        assert values(resumed) == values(whole)
        whole.step()
        resumed.step()


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
@settings(max_examples=12, deadline=None)
@given(
    stop=st.integers(0, 120),
    order=st.sampled_from(ORDERS),
    library=st.sampled_from([torch.optim, stepwell]),
    by_hand=st.booleans(),
)
def test_the_next_values_are_the_same_to_the_bit(case, stop, order, library, by_hand):
    check(case, stop, order, library, by_hand)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
@settings(max_examples=6, deadline=None)
@given(stop=st.integers(0, 120), order=st.sampled_from(BARE))
def test_without_the_optimizers_state_too(case, stop, order):
    check(case, stop, order, stepwell, by_hand=False)


@pytest.mark.parametrize("stop", [0, 1, 3, 50])
@pytest.mark.parametrize(
    "case", [c for c in ALL if c.name != "ChainedScheduler"], ids=lambda case: case.label
)
def test_last_epoch_resumes_too(case, stop):
    whole = case.make(lr_scheduler, make(stepwell))
    advance(whole, stop + 1)
    held = make(stepwell)
    held.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed = case.make(lr_scheduler, held, last_epoch=stop)
    for _ in range(9):
        assert resumed.last_epoch == whole.last_epoch
        assert values(resumed) == values(whole)
        whole.step()
        resumed.step()


@pytest.mark.parametrize("order", [order for order in ORDERS if STATE in order], ids=" ".join)
@pytest.mark.parametrize(
    ("name", "saved", "other"),
    [
        (
            "OneCycleLR",
            {"max_lr": 0.4, "total_steps": 50},
            {"max_lr": 0.9, "total_steps": 9, "div_factor": 3.0, "max_momentum": 0.99},
        ),
        ("SWALR", {"swa_lr": 0.05}, {"swa_lr": [0.5, 0.6, 0.7], "anneal_epochs": 3}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0}, {"base_lr": 0.2, "max_lr": 3.0}),
        ("CosineAnnealingLR", {"T_max": 30}, {"T_max": 9, "eta_min": 0.01}),
    ],
)
def test_arguments_that_were_loaded_win(name, saved, other, order):
    whole = Case(name, saved).make(lr_scheduler, make(stepwell))
    advance(whole, 7)
    state = copy.deepcopy((whole.optimizer.state_dict(), whole.state_dict()))
    resumed = resume(Case(name, other), (*state, 7), order, stepwell)
    for _ in range(9):
        whole.step()
        resumed.step()
        assert values(resumed) == values(whole)


def torchs(held: Any) -> dict[str, Any]:
    """Two schedules of torch's, for one of ours that drives them."""
    theirs = torch.optim.lr_scheduler
    parts = [theirs.ConstantLR(held, 0.5, total_iters=4), theirs.ExponentialLR(held, 0.9)]
    return {"schedulers": parts}


@pytest.mark.parametrize("library", [torch.optim, stepwell])
@pytest.mark.parametrize("order", [order for order in ORDERS if STATE in order], ids=" ".join)
@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize(
    "case",
    [
        Case("SequentialLR", parts=lambda _, held: {**torchs(held), "milestones": [3]}),
        Case("ChainedScheduler", parts=lambda _, held: torchs(held)),
    ],
    ids=lambda case: case.name,
)
def test_what_was_loaded_wins_over_what_torchs_constructors_write(case, stop, order, library):
    """They write before any schedule of ours can look."""
    check(case, stop, order, library, by_hand=False)


class Around(torch.optim.Optimizer):
    """A wrapper that never calls Optimizer's constructor, as those of other libraries."""

    def __init__(self, held: Any) -> None:
        self.held, self.defaults, self.state = held, held.defaults, held.state

    @property
    def param_groups(self) -> Any:
        return self.held.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.held.step(closure)

    def state_dict(self) -> Any:
        return self.held.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.held.load_state_dict(state_dict)


class WithStepHooks(Around):
    def __init__(self, held: Any) -> None:
        super().__init__(held)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()


class Forwarding(WithStepHooks):
    """Its hooks of loading are those of the optimizer inside."""

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.held.register_load_state_dict_post_hook(hook, prepend)


@pytest.mark.parametrize("order", [order for order in ORDERS if STATE in order], ids=", ".join)
@pytest.mark.parametrize("wrapper", [Around, WithStepHooks, Forwarding])
@pytest.mark.parametrize(
    "case",
    [c for c in ALL if c.name in ("OneCycleLR", "ChainedScheduler", "Schedule")],
    ids=lambda case: case.label,
)
def test_the_optimizer_may_be_a_wrapper(case, wrapper, order, monkeypatch):
    monkeypatch.setitem(globals(), "make", lambda library, made=make: wrapper(made(library)))
    # only who is told of a load knows that the rates are not those of the schedule's file
    check(case, 7, order, stepwell, by_hand=wrapper is Forwarding)


# where the user's line stands: after the optimizer was loaded, before or after the schedule is made
SET = "value set"
ORDERS_OF_SETTING = [
    order
    for what in (STATE, STEP)
    for order in itertools.permutations((MADE, OPTIMIZER, SET, what))
    if order.index(OPTIMIZER) < order.index(SET)
    and order.index(MADE) < order.index(what)
    # a constructor may start from what is set, as torch's do, if nothing is loaded into it
    and order.index(OPTIMIZER) < order.index(what)
]
# every hyperparameter that some schedule drives, and one that none of these does
BY_HAND = {"lr": 0.003, "momentum": 0.55, "weight_decay": 0.25}


def resume_and_set(
    case: Case, saved: Any, order: tuple[str, ...], held: Any, given: dict[str, Any]
) -> Any:
    made, (optimizer_state, state, step) = None, copy.deepcopy(saved)
    for what in order:
        if what == MADE:
            made = case.make(lr_scheduler, held)
        elif what == OPTIMIZER:
            held.load_state_dict(optimizer_state)
        elif what == SET:
            held.param_groups[0].update(given)
        else:
            made.load_state_dict(state if what == STATE else {"last_epoch": step})
    return made


@pytest.mark.parametrize("library", [torch.optim, stepwell])
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_what_is_set_after_the_optimizer_was_loaded_stays(case, library):
    for order, stop in itertools.product(ORDERS_OF_SETTING, [0, 3]):
        whole = case.make(lr_scheduler, make(library))
        advance(whole, stop)
        saved = whole.optimizer.state_dict(), whole.state_dict(), whole.last_epoch
        resumed = resume_and_set(case, saved, order, make(library), BY_HAND)
        first = resumed.optimizer.param_groups[0]
        assert {key: first[key] for key in BY_HAND} == BY_HAND, order
        # groups that nobody has touched are those of the training that was not interrupted
        assert values(resumed)[1:] == values(whole)[1:], order
        if order[-1] != SET:
            assert resumed.get_last_lr()[0] == 0.003


@pytest.mark.parametrize("order", ORDERS_OF_SETTING, ids=" ".join)
@pytest.mark.parametrize("name", ["StepLR", "LinearLR", "OneCycleLR"])
@pytest.mark.parametrize("library", [torch.optim, stepwell])
def test_tensors_and_one_of_two_betas_stay_too(name, order, library):
    arguments = {"StepLR": {"step_size": 2}, "OneCycleLR": {"max_lr": 0.4, "total_steps": 50}}
    case = Case(name, arguments.get(name, {}))

    def fresh() -> Any:
        rates = [torch.tensor(0.5), torch.tensor(0.25)]
        return optimizer(*rates, kind=library.Adam, betas=(0.9, 0.999))

    whole = case.make(lr_scheduler, fresh())
    advance(whole, 3)
    saved = whole.optimizer.state_dict(), whole.state_dict(), whole.last_epoch
    second = {"lr": torch.tensor(0.003), "betas": (0.9, 0.5)}
    # the schedule may have written the first of the betas already: then it is none of the user's
    resumed = resume_and_set(case, saved, order, fresh(), second)
    group, other = resumed.optimizer.param_groups
    assert group["lr"].item() == pytest.approx(0.003)
    assert group["betas"][1] == 0.5
    expected = whole.optimizer.param_groups[1]
    assert (other["lr"], other["betas"]) == (expected["lr"], expected["betas"])


def test_a_rate_set_long_ago_is_none_that_was_set_after_loading():
    whole = lr_scheduler.StepLR(optimizer(1.0), 2)
    early = copy.deepcopy(whole.state_dict())
    whole.optimizer.param_groups[0]["lr"] = 0.3
    advance(whole, 5)
    # back to the start, as after an epoch that went wrong
    whole.load_state_dict(early)
    assert whole.optimizer.param_groups[0]["lr"] == 1.0


def test_a_fresh_optimizer_is_moved_to_its_step():
    seen = []
    for module in (torch.optim.lr_scheduler, lr_scheduler):
        held = optimizer(1e-3)
        held.param_groups[0].update(initial_lr=1e-3, lr=1e-3)
        made = module.CosineAnnealingLR(held, 20, last_epoch=9)
        seen.append(made.get_last_lr())
        made.step()
        seen[-1] = [*seen[-1], *made.get_last_lr()]
    assert seen[0] == pytest.approx([1e-3, 8.43565535e-4])
    assert seen[1] == pytest.approx([5e-4, 4.21782767e-4])


def trained(kind: Any, by_loading: bool) -> Any:
    """An optimizer that has taken a step, or loaded one, and whose rate was then set by hand."""
    held, other = optimizer(0.3, kind=kind), optimizer(0.7, kind=kind)
    for param in held.param_groups[0]["params"]:
        param.grad = torch.ones(2)
    held.step()
    if by_loading:
        other.load_state_dict(copy.deepcopy(held.state_dict()))
        held = other
    held.param_groups[0].update(initial_lr=5e-4, lr=5e-4)
    return held


@pytest.mark.parametrize("by_loading", [True, False])
@pytest.mark.parametrize("kind", ["Adam", "Adagrad", "Muon"])
@pytest.mark.parametrize("library", [torch.optim, stepwell])
def test_an_initial_rate_set_in_a_trained_optimizer_stays(library, kind, by_loading, monkeypatch):
    if kind == "Muon":
        monkeypatch.setattr(torch, "ones", lambda *_, made=torch.ones: made(2, 2))
    if library is torch.optim and kind == "Adagrad":
        # it has state, but not of a step
        fresh = optimizer(1.0, kind=torch.optim.Adagrad)
        fresh.param_groups[0]["initial_lr"] = 1.0
        assert lr_scheduler.StepLR(fresh, 2, 0.5, last_epoch=3).get_last_lr() == [0.25]
    for name, more in (("CosineAnnealingLR", {"T_max": 20}), ("ExponentialLR", {"gamma": 0.9})):
        held = [trained(getattr(library, kind), by_loading) for _ in range(2)]
        modules = (torch.optim.lr_scheduler, lr_scheduler)
        twins = [
            Case(name, more).make(module, each, last_epoch=9)
            for module, each in zip(modules, held, strict=True)
        ]
        assert twins[1].get_last_lr() == [5e-4]
        for _ in range(4):
            assert twins[1].get_last_lr() == pytest.approx(twins[0].get_last_lr())
            advance(twins[0], 1)
            advance(twins[1], 1)
    schedule = Schedule(trained(getattr(library, kind), by_loading), lr=cosine(20), last_epoch=9)
    assert schedule.get_last_lr() == [5e-4]
    # and where the step, or the state, is loaded after a constructor has written its first rate
    held = trained(getattr(library, kind), by_loading)
    parts = [lr_scheduler.ConstantLR(held, 0.5), lr_scheduler.ExponentialLR(held, 0.9)]
    whole = lr_scheduler.SequentialLR(held, parts, milestones=[4], last_epoch=7)
    assert whole.get_last_lr() == [held.param_groups[0]["lr"]] == [5e-4]


@pytest.mark.parametrize("library", [torch.optim, stepwell])
def test_a_rate_set_after_a_load_that_was_seen_stays_without_any_state(library):
    held = optimizer(0.3, kind=library.SGD)
    lr_scheduler.ExponentialLR(held, 0.9)
    held.load_state_dict(held.state_dict())
    held.param_groups[0].update(initial_lr=5e-4, lr=5e-4)
    assert lr_scheduler.CosineAnnealingLR(held, 20, last_epoch=9).get_last_lr() == [5e-4]
