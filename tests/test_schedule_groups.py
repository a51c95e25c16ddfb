"""Do groups join every schedule, and is what differs from torch's schedules what the table says?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

import stepwell
from stepwell import lr_scheduler
from stepwell.lr_scheduler import Schedule, cosine, linear
from stepwell.lr_scheduler.hyperparameters import write

from .schedule_cases import CASES, RATES, Case, optimizer, wobble

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")


def join(held: Any, rate: float) -> dict[str, Any]:
    held.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate})
    return held.param_groups[-1]


@pytest.mark.parametrize("library", [torch.optim, stepwell])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_group_joins_with_its_own_rate(case, library):
    scheduler = case.make(lr_scheduler, optimizer(*RATES, kind=library.SGD, momentum=0.9))
    alone = case.make(lr_scheduler, optimizer(*RATES, kind=library.SGD, momentum=0.9))
    for _ in range(3):
        scheduler.step()
        alone.step()
    group = join(scheduler.optimizer, 0.8)
    assert group["lr"] == 0.8
    for _ in range(20):
        scheduler.step()
        alone.step()
        assert scheduler.get_last_lr()[:3] == alone.get_last_lr()
        assert scheduler.get_last_lr()[3] == group["lr"] >= 0
    assert group["initial_lr"] > 0


def torchs(name: str, **more: Any) -> Case:
    """Two schedules of torch's, driven by one of ours."""

    def parts(_: Any, held: Any) -> dict[str, Any]:
        theirs = torch_schedulers
        cycle = theirs.OneCycleLR(held, 1.0, total_steps=60)
        made = [cycle, theirs.LambdaLR(held, wobble), theirs.StepLR(held, 2)]
        return {"schedulers": made, **more}

    return Case(name, parts=parts)


# a chain of a line, a cosine with a floor, and functions
WITH_FLOOR = [case for case in CASES if case.name == "ChainedScheduler"][1]


def in_proportion() -> Any:
    for case in (*CASES, torchs("SequentialLR", milestones=[8, 12]), torchs("ChainedScheduler")):
        # a floor that all groups share has no proportion
        listed = any(isinstance(value, list) for value in case.arguments.values())
        with_floor = case.arguments.get("eta_min") or case is WITH_FLOOR
        if not (with_floor or (listed and case.name == "LambdaLR")):
            yield case
    yield Case("Schedule", {"lr": cosine(30) * linear(0.5, 1, 9)})


@pytest.mark.parametrize("joins", [0, 1, 5, 12])
@pytest.mark.parametrize("case", list(in_proportion()), ids=lambda case: case.label)
def test_a_group_goes_on_in_proportion(case, joins):
    """Like a backbone that is unfrozen in the middle, at a tenth of the head's present rate."""
    held = optimizer(*RATES, kind=stepwell.SGD, momentum=0.9)
    scheduler = case.make(lr_scheduler, held)
    for _ in range(joins):
        scheduler.step()
    head = held.param_groups[0]
    if not head["lr"]:
        return
    own = head["lr"] / 10
    backbone = join(held, own)
    for _ in range(30):
        scheduler.step()
        if case.name == "MultiplicativeLR" and isinstance(case.arguments["lr_lambda"], list):
            assert backbone["lr"] == pytest.approx(own)
        else:
            assert backbone["lr"] == pytest.approx(head["lr"] / 10, rel=1e-6)
        # torch's cycle is over in a sequence when the last group joins
        if joins < 12:
            assert backbone["momentum"] == pytest.approx(head["momentum"])


@pytest.mark.parametrize(("name", "more"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_second_hyperparameter_of_a_group_that_joins(name, more, kind):
    held = optimizer(kind(1.0), kind=getattr(stepwell, name), **more)
    scheduler = lr_scheduler.OneCycleLR(held, 1.0, total_steps=20)
    for _ in range(5):
        scheduler.step()
    join(held, kind(0.05))
    for _ in range(15):
        scheduler.step()
        first, second = held.param_groups
        assert float(second["lr"]) == pytest.approx(float(first["lr"]) * second_share(held))
        key = "betas" if name == "AdamW" else "momentum"
        assert second[key] == pytest.approx(first[key])


def second_share(held: Any) -> float:
    return float(held.param_groups[1]["max_lr"]) / float(held.param_groups[0]["max_lr"])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("CosineAnnealingWarmRestarts", {"T_0": 10}),
        ("LambdaLR", {"lr_lambda": lambda step: 1 - (step % 10) / 10}),
        ("CosineAnnealingLR", {"T_max": 9}),
    ],
)
def test_a_rate_above_all_others_is_an_initial_one(name, arguments):
    """At the end of a cycle, a quotient of rates would make the next one explode."""
    held = optimizer(1.0)
    parts = [Case(name, arguments).make(lr_scheduler, held), lr_scheduler.ConstantLR(held, 1.0)]
    scheduler = lr_scheduler.SequentialLR(held, parts, milestones=[10])
    for _ in range(9):
        scheduler.step()
    backbone = join(held, 0.1)
    for _ in range(3):
        scheduler.step()
        assert backbone["lr"] <= 0.1


def test_groups_that_join_where_all_rates_are_zero_keep_their_own():
    for case in (
        Case("OneCycleLR", {"max_lr": 0.0, "total_steps": 20}),
        Case("CyclicLR", {"base_lr": 0.0, "max_lr": 1.0, "step_size_up": 4}),
        Case("SWALR", {"swa_lr": 0.0, "anneal_epochs": 0}),
    ):
        scheduler = case.make(lr_scheduler, optimizer(1.0, momentum=0.9))
        group = join(scheduler.optimizer, 0.1)
        seen = []
        for _ in range(9):
            scheduler.step()
            seen.append(group["lr"])
        assert max(seen) == pytest.approx(0.1)


@pytest.mark.parametrize("order", ["optimizer, state", "state, optimizer", "step, optimizer"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_schedule_resumes_with_a_group_that_has_joined(case, order):
    whole = case.make(lr_scheduler, optimizer(*RATES, momentum=0.9))
    resumed = case.make(lr_scheduler, optimizer(*RATES, momentum=0.9))
    whole.step()
    for scheduler in (whole, resumed):
        join(scheduler.optimizer, 0.8)
    for _ in range(3):
        whole.step()
    saved = copy.deepcopy((whole.optimizer.state_dict(), whole.state_dict()))
    for what in order.split(", "):
        if what == "optimizer":
            resumed.optimizer.load_state_dict(saved[0])
        else:
            resumed.load_state_dict(saved[1] if what == "state" else {"last_epoch": 4})
    for _ in range(9):
        assert resumed.optimizer.param_groups[3]["lr"] == whole.optimizer.param_groups[3]["lr"]
        assert resumed.get_last_lr()[:3] == whole.get_last_lr()[:3]
        whole.step()
        resumed.step()


def test_where_a_group_that_joins_goes_on():
    chained = lr_scheduler.ExponentialLR(optimizer(0.1), 0.5)
    closed = lr_scheduler.LambdaLR(optimizer(0.1), lambda step: 0.5**step)
    each = lr_scheduler.LambdaLR(optimizer(0.1, 0.1), [wobble, lambda step: 0.5**step])
    cycle = lr_scheduler.OneCycleLR(optimizer(0.1, momentum=0.9), 1.0, total_steps=50)
    mixed = Schedule(optimizer(0.1), lr=linear(1, 0, 10))
    groups = []
    for scheduler in (chained, closed, each, cycle, mixed):
        scheduler.step()
        groups.append(join(scheduler.optimizer, 0.8))
    first = cycle.optimizer.param_groups[0]
    before = first["lr"]
    for scheduler in (chained, closed, each, cycle, mixed):
        scheduler.step()
    rates = [group["lr"] for group in groups]
    assert rates == pytest.approx([0.4, 0.2, 0.8, 0.8 * first["lr"] / before, 0.8 * 0.8 / 0.9])


def test_a_group_that_joins_a_schedule_of_functions_stops_torch():
    scheduler = torch_schedulers.LambdaLR(optimizer(0.1), wobble)
    join(scheduler.optimizer, 0.8)
    with pytest.raises(ValueError, match="zip"):
        scheduler.step()


def test_a_floor_for_each_group_of_a_plateau_is_no_obstacle():
    held = optimizer(1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(held, factor=0.5, patience=0, min_lr=[0.9])
    join(held, 0.8)
    for _ in range(2):
        scheduler.step(1.0)
    assert scheduler.get_last_lr() == [0.9, 0.4]


def test_a_plateau_takes_the_step_that_frameworks_give_to_all_schedules():
    with pytest.raises(TypeError, match="last_epoch"):
        torch_schedulers.ReduceLROnPlateau(optimizer(1.0), last_epoch=-1)
    for taken in (-1, 4):
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer(1.0), patience=0, last_epoch=taken)
        assert scheduler.last_epoch == taken + 1
        for _ in range(2):
            scheduler.step(1.0)
        assert (scheduler.last_epoch, scheduler.get_last_lr()) == (taken + 3, [0.1])
    with pytest.raises(ValueError, match=r"last_epoch value: -2.*ReduceLROnPlateau"):
        lr_scheduler.ReduceLROnPlateau(optimizer(1.0), last_epoch=-2)


def test_the_state_of_a_schedule_alone_brings_its_rates():
    rates = []
    for module in (torch_schedulers, lr_scheduler):
        whole = module.LinearLR(optimizer(0.3), 0.1, total_iters=10)
        for _ in range(5):
            whole.step()
        resumed = module.LinearLR(optimizer(0.3), 0.1, total_iters=10)
        resumed.load_state_dict(whole.state_dict())
        rates.append((resumed.optimizer.param_groups[0]["lr"], whole.get_last_lr()[0]))
    assert rates[0][0] == pytest.approx(0.03)
    assert rates[1][0] == rates[1][1] == pytest.approx(0.165)


def test_a_loaded_rate_survives_the_constructor():
    rates = []
    for module in (torch_schedulers, lr_scheduler):
        whole = module.LinearLR(optimizer(0.3), 0.1, total_iters=10)
        for _ in range(10):
            whole.step()
        held = optimizer(0.3)
        held.load_state_dict(whole.optimizer.state_dict())
        module.LinearLR(held, 0.1, total_iters=10).load_state_dict(whole.state_dict())
        rates.append(held.param_groups[0]["lr"])
    assert rates == pytest.approx([0.03, 0.3])


def test_a_sequence_resumes_where_it_stood():
    rates = []
    for module in (torch_schedulers, lr_scheduler):
        held = optimizer(1.0)
        parts = [module.ConstantLR(held, 0.5, 99), module.ExponentialLR(held, 0.5)]
        scheduler = module.SequentialLR(held, parts, milestones=[3], last_epoch=4)
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.5, 0.25]


def test_a_sequence_of_sequences():
    def steps(module: Any) -> list[float]:
        held = optimizer(1.0)
        inner = [module.ConstantLR(held, 0.5, 99), module.ExponentialLR(held, 0.5)]
        first = module.SequentialLR(held, inner, milestones=[2])
        whole = module.SequentialLR(held, [first, module.ConstantLR(held, 0.1, 99)], [5])
        seen = []
        for _ in range(7):
            seen.append(held.param_groups[0]["lr"])
            whole.step()
        return seen

    assert steps(lr_scheduler) == pytest.approx([0.5, 0.5, 1.0, 0.5, 0.25, 0.1, 0.1])
    # the inner one begins its second part a step too early
    assert steps(torch_schedulers)[1] == 1.0


def test_a_chain_after_a_value_of_zero_keeps_both_factors():
    rates = []
    for module in (torch_schedulers, lr_scheduler):
        held = optimizer(1.0)
        chain = module.ChainedScheduler(
            [module.ConstantLR(held, 0.5, 99), module.CosineAnnealingLR(held, 2)]
        )
        for _ in range(4):
            chain.step()
        rates.append(chain.get_last_lr()[0])
    assert rates == pytest.approx([1.0, 0.5])


def test_a_rate_changed_by_hand_where_the_factor_is_zero():
    rates = []
    for module in (torch_schedulers, lr_scheduler):
        scheduler = Case("ExponentialLR", {"gamma": 0.0}).make(module, optimizer(1.0))
        scheduler.step()
        scheduler.optimizer.param_groups[0]["lr"] = 0.2
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.0, 0.2]


def numbers(value: Any) -> list[float]:
    return list(map(float, value if isinstance(value, tuple) else (value,)))


SHARED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("OneCycleLR", {"max_lr": [0.1, 0.2, 0.1], "total_steps": 5}, ["lr"]),
    (
        "OneCycleLR",
        {"max_lr": 0.1, "total_steps": 5, "max_momentum": [0.7, 0.8, 0.7]},
        ["momentum"],
    ),
    (
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 2, "max_momentum": [0.7, 0.8, 0.7]},
        ["momentum"],
    ),
    (
        "LambdaLR",
        {"lr_lambda": [lambda t: 1 / (1 + t), lambda t: 1.0, lambda t: 1 / (1 + t)]},
        ["lr"],
    ),
    ("SWALR", {"swa_lr": [0.1, 0.3, 0.1], "anneal_epochs": 2}, ["lr"]),
    ("ReduceLROnPlateau", {"min_lr": [0.0, 0.4, 0.0], "patience": 0}, ["lr"]),
    ("StepLR", {"step_size": 1}, []),
]


@pytest.mark.parametrize("betas", [False, True])
@pytest.mark.parametrize("library", [torch.optim, stepwell])
@pytest.mark.parametrize(("name", "arguments", "parted"), SHARED)
def test_groups_that_share_a_tensor_are_led_each_by_itself(
    name: str, arguments: Any, parted: list[str], library: Any, betas: bool
) -> None:
    """Those that hold numbers say where to; what all groups share goes on being shared."""
    kinds = {"betas": (0.9, 0.99)} if betas else {"momentum": 0.9}
    given: Any = {"lr": 0.5, **kinds}

    def made(numbers: Any) -> Any:
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(3)]
        if betas and library is torch.optim:
            numbers = {**numbers, "capturable": True}
        return (library.Adam if betas else library.SGD)(groups, **numbers)

    shared = {
        key: tuple(map(torch.tensor, v)) if type(v) is tuple else torch.tensor(v)
        for key, v in given.items()
    }
    held = [made(given), made(shared)]
    schedules = [getattr(lr_scheduler, name)(each, **arguments) for each in held]
    for _ in range(3):
        for schedule in schedules:
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        for plain, group in zip(*(each.param_groups for each in held), strict=True):
            for key in given:
                assert numbers(group[key]) == pytest.approx(numbers(plain[key]), rel=1e-5)
    groups = held[1].param_groups
    for key, tensor in shared.items():
        holders = [group[key][0] if betas and key == "betas" else group[key] for group in groups]
        first = tensor[0] if type(tensor) is tuple else tensor
        is_parted = key in parted or (key == "betas" and "momentum" in parted)
        assert [each is first for each in holders] == [True, not is_parted, True]
        if key == "betas":
            # what no schedule writes is shared by all
            assert all(group[key][1] is tensor[1] for group in groups)


def test_a_group_that_a_schedule_leaves_alone_keeps_its_rate() -> None:
    rate = torch.tensor(0.5)
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    held = stepwell.SGD([{"params": params[:1], "name": "a"}, {"params": params[1:]}], lr=rate)
    write(held.param_groups, {"lr": [0.1, None]})
    assert [group["lr"].item() for group in held.param_groups] == pytest.approx([0.1, 0.5])
    assert held.param_groups[0]["lr"] is rate


def first_tensors(held: Any) -> list[torch.Tensor]:
    group = held.param_groups[0]
    return [group["lr"], *(group["betas"] if "betas" in group else [group["momentum"]])]


@pytest.mark.parametrize("kinds", [{"momentum": 0.9}, {"betas": (0.9, 0.99)}])
def test_a_group_that_is_added_starts_with_what_the_constructor_was_given(kinds: Any) -> None:
    tensors = {
        key: tuple(map(torch.tensor, v)) if type(v) is tuple else torch.tensor(v)
        for key, v in {"lr": 0.5, **kinds}.items()
    }
    kind = stepwell.Adam if "betas" in kinds else stepwell.SGD
    held = kind([torch.nn.Parameter(torch.ones(1))], **tensors)
    given = [tensors["lr"], *(tensors.get("betas") or [tensors["momentum"]])]
    assert all(one is other for one, other in zip(first_tensors(held), given, strict=True))
    schedule = lr_scheduler.OneCycleLR(held, 0.2, total_steps=5)
    schedule.step()
    for _ in range(2):
        held.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    added = held.param_groups[1:]
    for group in added:
        assert group["lr"].item() == 0.5
        assert float(group["betas"][0] if "betas" in kinds else group["momentum"]) == pytest.approx(
            0.9
        )
    held.param_groups[1]["lr"].fill_(0.25)
    assert [group["lr"].item() for group in held.param_groups[2:]] == [0.5]
    schedule.step()
    assert all(one is other for one, other in zip(first_tensors(held), given, strict=True))


def test_a_rate_with_a_gradient_is_shared_with_groups_that_are_added() -> None:
    rate = torch.tensor(0.5, requires_grad=True)
    held = stepwell.SGD([torch.ones(1)], lr=rate, differentiable=True)
    held.add_param_group({"params": [torch.ones(1)]})
    assert held.param_groups[1]["lr"] is rate


def test_curves_on_tensors_are_filled_in_place():
    rate = torch.tensor(0.5)
    schedule = Schedule(optimizer(rate), lr=cosine(4))
    schedule.step()
    schedule.step()
    assert schedule.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.25)
