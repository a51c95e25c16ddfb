"""Does `Schedule` drive some groups only, by number or by name, where the others lack the value?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import stepwell
from stepwell.lr_scheduler import Schedule, absolute, constant, cosine, linear

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")

HALVES = linear(1.0, 0.0, 2)


def combined() -> Any:
    """Muon with two groups, of which one has a name, and AdamW."""
    one, two, bias = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((2, 2), (2, 2), (2,)))
    hidden = [{"params": [one]}, {"params": [two], "name": "head"}]
    parts = {"muon": stepwell.Muon(hidden, lr=0.1), "adamw": stepwell.AdamW([bias], lr=0.01)}
    return stepwell.Combined(parts)


def rates(held: Any) -> list[float]:
    return [group["lr"] for group in held.param_groups]


def momenta(held: Any) -> list[Any]:
    return [group.get("momentum") for group in held.param_groups]


def test_groups_go_by_the_name_of_their_optimizer():
    held = combined()
    schedule = Schedule(held, lr={"muon": HALVES, "adamw": constant()})
    schedule.step()
    assert rates(held) == pytest.approx([0.05, 0.05, 0.01])
    # what is said of a group is closer than what is said of its optimizer
    held = combined()
    schedule = Schedule(held, lr={"muon": HALVES, "head": constant(), 0: None})
    schedule.step()
    assert rates(held) == pytest.approx([0.1, 0.1, 0.01])
    with pytest.raises(ValueError, match="no group 'moun'; there are 0, 1, 2, 'muon', 'head', 'ad"):
        Schedule(combined(), lr={"moun": HALVES})


@pytest.mark.parametrize("driver", [{0: HALVES}, [HALVES, None, None]])
def test_groups_that_nothing_drives_may_lack_the_value(driver):
    held = combined()
    schedule = Schedule(held, lr=cosine(9), momentum=driver)
    untouched = set(stepwell.AdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0])
    for expected in (0.95 / 2, 0.0, 0.0):
        schedule.step()
        assert momenta(held) == [pytest.approx(expected), 0.95, None]
    assert held.param_groups[2].keys() - untouched == {"optimizer", "initial_lr"}
    # one of a pair, of the optimizer that has pairs
    betas = {"betas[0]": {"adamw": absolute(linear(0.9, 0.5, 2))}, "betas[1]": {2: HALVES}}
    schedule = Schedule(held := combined(), **betas)
    schedule.step()
    assert held.param_groups[2]["betas"] == pytest.approx((0.7, 0.999 / 2))
    assert schedule.preview(1) == [rates(held)]


def test_it_resumes_and_groups_join():
    def fresh() -> Any:
        return Schedule(combined(), lr=cosine(9), momentum={"muon": HALVES * 0.9})

    whole, resumed = fresh(), fresh()
    whole.step()
    saved = copy.deepcopy((whole.optimizer.state_dict(), whole.state_dict()))
    resumed.optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again = fresh()
    again.load_state_dict({"last_epoch": 1})
    for schedule in (whole, resumed, again):
        for name, shape in (("adamw", (2,)), ("muon", (2, 2))):
            more = {"params": [torch.nn.Parameter(torch.ones(*shape))], "optimizer": name}
            schedule.optimizer.add_param_group(more)
        schedule.step()
    assert momenta(whole.optimizer) == momenta(resumed.optimizer) == momenta(again.optimizer)
    assert momenta(whole.optimizer).count(None) == 2


def test_a_curve_that_a_saved_state_does_not_know_is_driven():
    saved = Schedule(combined(), lr=HALVES)
    saved.step()
    resumed = Schedule(combined(), lr=HALVES, weight_decay=linear(1.0, 0.0, 4))
    first = resumed.optimizer.param_groups[0]
    decay = first["weight_decay"]
    resumed.load_state_dict(saved.state_dict())
    for share in (0.75, 0.5, 0.25):
        assert first["weight_decay"] == pytest.approx(decay * share)
        resumed.step()


@pytest.mark.parametrize("values", [[0.1], {"lr": 0.1}, {"lr": ["0.1", 0.1, 0.1]}, None])
def test_initial_values_of_the_wrong_kind(values):
    schedule = Schedule(combined(), lr=HALVES)
    before = copy.deepcopy(schedule.state_dict())
    with pytest.raises(TypeError, match="'initial_values' must be a dict"):
        schedule.load_state_dict({**before, "initial_values": values})
    assert schedule.state_dict() == before


def test_one_curve_for_all_drives_those_of_a_later_group_that_have_it():
    hidden = torch.nn.Parameter(torch.ones(2, 2))
    parts = {"muon": stepwell.Muon([hidden]), "sgd": torch.optim.SGD([torch.ones(2)], momentum=0.9)}
    held = stepwell.Combined(parts)
    schedule = Schedule(held, momentum=HALVES)
    schedule.step()
    group = {"params": [torch.ones(3)], "optimizer": "sgd"}
    held.add_param_group(group)
    schedule.step()
    assert momenta(held) == pytest.approx([0.0, 0.0, 0.0])


def test_a_refusal_names_the_groups_that_have_the_value():
    for name, named in (
        ("momentum", r"momentum=\{0: curve, 1: curve\}"),
        ("betas[0]", r'\*\*\{"betas\[0\]": \{2: curve\}\}'),
    ):
        held = combined()
        before = copy.deepcopy(held.state_dict())
        with pytest.raises(
            ValueError, match=f"it has lr, .*; name the groups that have it: {named}"
        ) as caught:
            Schedule(held, **{name: HALVES})
        assert "optimizer" not in str(caught.value)
        assert "initial_lr" not in str(caught.value)
        assert held.state_dict() == before
