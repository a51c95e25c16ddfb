"""Is a state that was changed by hand, or is of another kind, refused whole or understood?"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

from stepwell import lr_scheduler

from .schedule_cases import CASES, RATES, Case, optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")

WRONG = [None, "x", {}, [], {"a": 1}, ["x"], [None], 2.5, -3, math.nan, True, torch.ones(2), 10**6]
ALL = (*CASES, Case("ReduceLROnPlateau"), Case("ReduceLROnPlateau", {"min_lr": [0.1, 0.0, 2.0]}))


def stepped(case: Any, steps: int) -> Any:
    scheduler = case.make(lr_scheduler, optimizer(*RATES, momentum=0.9))
    advance(scheduler, steps)
    return scheduler


def advance(scheduler: Any, steps: int = 1) -> None:
    metric = [1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []
    for _ in range(steps):
        scheduler.step(*metric)


def seen(scheduler: Any) -> Any:
    groups = [{**group, "params": []} for group in scheduler.optimizer.param_groups]
    return copy.deepcopy((scheduler.state_dict(), groups))


def error_of(call: Any, *arguments: Any) -> str | None:
    """Return the message of an error that tells of a mistake by the user; raise any other."""
    try:
        call(*arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


# entries that messages call by the name of the argument
SPELT = {"_anneal_func_type": "anneal_strategy", "_scale_fn_custom": "scale_fn"}


@pytest.mark.filterwarnings("ignore:OneCycleLR. total_steps is")
@pytest.mark.parametrize(
    "case", list({case.name: case for case in ALL}.values()), ids=lambda c: c.name
)
def test_entries_of_the_wrong_kind(case):
    state = stepped(case, 3).state_dict()
    for key, value in itertools.product(state, WRONG):
        scheduler = stepped(case, 1)
        before = seen(scheduler)
        said = error_of(scheduler.load_state_dict, {**copy.deepcopy(state), key: value})
        if said is not None:
            assert case.name in said, (key, value, said)
            assert SPELT.get(key, key.strip("_s")) in said, (key, value, said)
            assert seen(scheduler) == before, (key, value)
        else:
            # it means something; where that leads is no error of Python's
            said = error_of(advance, scheduler, 2)
            assert said is None or case.name in said, (key, value, said)


@pytest.mark.parametrize("given", [None, 3, "state", [1]])
@pytest.mark.parametrize("name", ["StepLR", "ReduceLROnPlateau", "ChainedScheduler"])
def test_what_is_no_state(name, given):
    [case] = [case for case in (*ALL, Case("StepLR", {"step_size": 3})) if case.name == name][-1:]
    with pytest.raises(TypeError, match=f"^{name}: state_dict must be a dict.*got "):
        stepped(case, 0).load_state_dict(given)


def test_a_users_own_schedule_may_change_the_kind_of_what_it_keeps():
    class Free(lr_scheduler.StepLR):
        phase: Any = 0

    made = [Free(optimizer(1.0), 2) for _ in range(2)]
    for scheduler, phase in zip(made, (0, "over"), strict=True):
        scheduler.phase = phase
    made[0].load_state_dict(made[1].state_dict())
    assert made[0].phase == "over"
    with pytest.raises(TypeError, match="Free: the state's 'base_lrs' must be a list of numbers"):
        made[0].load_state_dict({"base_lrs": "x"})


@pytest.mark.parametrize("milestones", [[2, 3], (2, 3), {2: 1, 3: 1}, Counter([2, 3])])
def test_milestones_as_lists_of_older_files(milestones):
    case = Case("MultiStepLR", {"milestones": [2, 3], "gamma": 0.5})
    scheduler = case.make(lr_scheduler, optimizer(1.0))
    scheduler.load_state_dict({**scheduler.state_dict(), "milestones": milestones})
    assert scheduler.milestones == Counter([2, 3])
    assert scheduler.preview(5) == [[1.0], [1.0], [0.5], [0.25], [0.25]]


class TestOneCycleThatIsExtended:
    SHORT = Case("OneCycleLR", {"max_lr": 1.0, "total_steps": 10})
    LONG = Case("OneCycleLR", {"max_lr": 1.0, "total_steps": 20})

    def test_by_the_constructor_is_said(self):
        whole = stepped(self.SHORT, 4)
        resumed = self.LONG.make(lr_scheduler, optimizer(*RATES, momentum=0.9))
        with pytest.warns(
            UserWarning, match=r"total_steps is 10 in the state .* 20 in .* so step 11 is rejected"
        ) as caught:
            resumed.load_state_dict(whole.state_dict())
        assert caught[0].filename == __file__
        assert resumed.total_steps == 10
        assert resumed.preview(6) == whole.preview(6)

    @pytest.mark.parametrize("more", [{}, {"three_phase": True, "pct_start": 0.25}])
    def test_by_the_state_is_done(self, more):
        state = stepped(Case("OneCycleLR", {**self.SHORT.arguments, **more}), 4).state_dict()
        state["total_steps"] = 20
        long = Case("OneCycleLR", {**self.LONG.arguments, **more})
        resumed, expected = stepped(long, 0), stepped(long, 4)
        resumed.load_state_dict(state)
        # until the next step, the rate is the one that belongs to the state
        for _ in range(16):
            advance(resumed)
            advance(expected)
            assert resumed.get_last_lr() == pytest.approx(expected.get_last_lr())
