"""Is bad input refused, with torch's words first where torch refuses it, and nothing changed?"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import Adagrad
from torch.optim import lr_scheduler as torch_schedulers

import stepwell
from stepwell import lr_scheduler
from stepwell.lr_scheduler import Schedule, absolute, cosine, linear, warmup

from .schedule_cases import Case, Decay, optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")


def parts(module: Any, held: Any) -> list[Any]:
    return [module.ConstantLR(held), module.ExponentialLR(held, 0.9)]


def composite(name: str, change: Any, **more: Any) -> Any:
    """A composite whose parts, as `change` has them, are wrong."""

    def make(module: Any, held: Any) -> Any:
        arguments = {"schedulers": change(parts(module, held), module), **more}
        given = {} if name == "ChainedScheduler" else {"optimizer": held}
        return getattr(module, name)(**given, **arguments)

    return make


def simple(name: str, **arguments: Any) -> Any:
    return lambda module, held: Case(name, arguments).make(module, held)


def stray(made: list[Any], module: Any) -> list[Any]:
    return [made[0], module.ExponentialLR(optimizer(0.1), 0.9)]


def plateau(made: list[Any], module: Any) -> list[Any]:
    return [made[0], module.ReduceLROnPlateau(made[0].optimizer)]


# what torch refuses
TORCHS = {
    "lambdas": simple("LambdaLR", lr_lambda=[abs]),
    "factors": simple("MultiplicativeLR", lr_lambda=[abs, abs, abs]),
    "no function": simple("MultiplicativeLR", lr_lambda=[3, abs]),
    "factor": simple("ConstantLR", factor=1.5),
    "negative factor": simple("ConstantLR", factor=-0.5),
    "start": simple("LinearLR", start_factor=0),
    "end": simple("LinearLR", end_factor=1.1),
    "T_0": simple("CosineAnnealingWarmRestarts", T_0=0),
    "T_0 fraction": simple("CosineAnnealingWarmRestarts", T_0=2.5),
    "T_mult": simple("CosineAnnealingWarmRestarts", T_0=3, T_mult=0),
    "T_mult fraction": simple("CosineAnnealingWarmRestarts", T_0=3, T_mult=1.5),
    "eta_min": simple("CosineAnnealingWarmRestarts", T_0=3, eta_min="0"),
    "mode": simple("CyclicLR", base_lr=0.1, max_lr=1.0, mode="square"),
    "base_lr": simple("CyclicLR", base_lr=[0.1], max_lr=1.0),
    "max_lr": simple("CyclicLR", base_lr=0.1, max_lr=[1.0]),
    "total": simple("OneCycleLR", max_lr=1.0, total_steps=0),
    "total fraction": simple("OneCycleLR", max_lr=1.0, total_steps=1.5),
    "epochs": simple("OneCycleLR", max_lr=1.0, epochs=0, steps_per_epoch=3),
    "per epoch": simple("OneCycleLR", max_lr=1.0, epochs=3, steps_per_epoch=-3),
    "no total": simple("OneCycleLR", max_lr=1.0, epochs=3),
    "pct": simple("OneCycleLR", max_lr=1.0, total_steps=9, pct_start=1.5),
    "pct integer": simple("OneCycleLR", max_lr=1.0, total_steps=9, pct_start=1),
    "strategy": simple("OneCycleLR", max_lr=1.0, total_steps=9, anneal_strategy="step"),
    "peaks": simple("OneCycleLR", max_lr=[1.0], total_steps=9),
    "plateau factor": simple("ReduceLROnPlateau", factor=1.0),
    "plateau mode": simple("ReduceLROnPlateau", mode="least"),
    "plateau threshold": simple("ReduceLROnPlateau", threshold_mode="least"),
    "plateau floors": simple("ReduceLROnPlateau", min_lr=[0.1]),
    "swa_lr": simple("SWALR", swa_lr=[0.1]),
    "swa strategy": simple("SWALR", swa_lr=0.1, anneal_strategy="step"),
    "swa epochs": simple("SWALR", swa_lr=0.1, anneal_epochs=-1),
    "no part": composite("SequentialLR", lambda made, module: [], milestones=[3]),
    "part": composite("SequentialLR", lambda made, module: [made[0], 3], milestones=[3]),
    "sequence plateau": composite("SequentialLR", plateau, milestones=[3]),
    "sequence stray": composite("SequentialLR", stray, milestones=[3]),
    "milestones": composite("SequentialLR", lambda made, module: made, milestones=[3, 4]),
    "no link": composite("ChainedScheduler", lambda made, module: []),
    "link": composite("ChainedScheduler", lambda made, module: [made[0], 3]),
    "chain plateau": composite("ChainedScheduler", plateau),
    "chain stray": composite("ChainedScheduler", stray),
    "resume": simple("StepLR", step_size=3, last_epoch=4),
}


def refusal(make: Any, module: Any, held: Any) -> Exception:
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        make(module, held)
    return caught.value


@pytest.mark.parametrize("make", TORCHS.values(), ids=TORCHS)
def test_torchs_words_come_first(make):
    theirs = refusal(make, torch_schedulers, optimizer(0.3, 0.2, momentum=0.9))
    held = optimizer(0.3, 0.2, momentum=0.9)
    before = copy.deepcopy(held.state_dict()) if "resume" not in str(theirs) else None
    ours = refusal(make, lr_scheduler, held)
    assert isinstance(ours, type(theirs))
    # torch 2.11 wrote "must by one of"
    first = str(theirs.args[0]).splitlines()[0].strip().removesuffix(".").replace("t by", "t be")
    # an optimizer is printed with its momentum in both, and nothing else varies
    assert str(ours.args[0]).startswith(first)
    assert before is None or composites_aside(held, before)


@pytest.mark.parametrize("name", ["sequence stray", "chain stray"])
def test_of_several_optimizers_the_remedy_is_said(name):
    said = str(refusal(TORCHS[name], lr_scheduler, optimizer(0.3)))
    assert said.endswith("from SGD. (construct all schedulers with the same optimizer)")


def composites_aside(held: Any, before: dict[str, Any]) -> bool:
    """Whether nothing was changed, but by the parts of a composite, which were made rightly."""
    after = held.state_dict()["param_groups"]
    return "initial_lr" in after[0] or held.state_dict() == before


WRONG = {
    "ConstantLR": {"factor": 2.0},
    "LinearLR": {"start_factor": 2.0, "end_factor": 2.0},
    "CosineAnnealingWarmRestarts": {"T_0": 0, "T_mult": 0, "eta_min": "x"},
    "CyclicLR": {"base_lr": [1.0] * 5, "max_lr": [1.0] * 5, "mode": "x"},
    "OneCycleLR": {"max_lr": [1.0] * 5, "total_steps": 0, "pct_start": 3, "anneal_strategy": "x"},
    "ReduceLROnPlateau": {"factor": 2.0, "mode": "x", "threshold_mode": "x", "min_lr": [1.0] * 5},
    "SWALR": {"swa_lr": [1.0] * 5, "anneal_epochs": -1, "anneal_strategy": "x"},
}
RIGHT = {
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 5},
    "SWALR": {"swa_lr": 0.1},
}


@pytest.mark.parametrize("name", WRONG)
def test_of_several_mistakes_the_one_is_named_that_torch_names(name):
    for some in itertools.product([False, True], repeat=len(WRONG[name])):
        given = {
            k: v for (k, v), is_wrong in zip(WRONG[name].items(), some, strict=True) if is_wrong
        }
        for held in (optimizer(0.3, momentum=0.9), SimpleNamespace(param_groups=[])):
            if not given or (name == "SWALR" and isinstance(held, SimpleNamespace)):
                continue
            case = Case(name, {**RIGHT.get(name, {}), **given})
            theirs = refusal(case.make, torch_schedulers, held)
            ours = refusal(case.make, lr_scheduler, held)
            assert type(ours) is type(theirs)
            assert str(ours).startswith(str(theirs).removesuffix("."))


def test_momentum_that_an_optimizer_lacks():
    for case in (
        Case("OneCycleLR", {"max_lr": 1.0, "total_steps": 9}),
        Case("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0}),
    ):
        words = []
        for module in (torch_schedulers, lr_scheduler):
            with pytest.raises(ValueError, match="optimizer must support momentum") as caught:
                case.make(module, optimizer(0.1, kind=Adagrad))
            words.append(str(caught.value))
        assert words[1].startswith(words[0])


CYCLES = [
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 2}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 9}),
]


@pytest.mark.parametrize(("name", "arguments"), CYCLES)
def test_momenta_above_one_are_taken_where_the_optimizer_takes_them(name, arguments):
    seen = []
    for module, kind in ((torch_schedulers, torch.optim.SGD), (lr_scheduler, stepwell.SGD)):
        held = optimizer(0.1, kind=kind, momentum=0.9)
        momenta = {"base_momentum": 1.5, "max_momentum": 2.0}
        scheduler = Case(name, {**arguments, **momenta}).make(module, held)
        seen.append([])
        for _ in range(8):
            seen[-1].append(held.param_groups[0]["momentum"])
            scheduler.step()
    assert seen[0] == pytest.approx(seen[1])
    for more in ({"base_momentum": 1.0}, {"max_momentum": 1.0}, {"max_momentum": [0.9, 1.0]}):
        held = optimizer(0.1, 0.1, kind=stepwell.AdamW)
        before = copy.deepcopy(held.state_dict())
        [argument] = more
        words = rf"^Invalid beta parameter at index 0: 1.0.*{name}: {argument} leads there"
        with pytest.raises(ValueError, match=words):
            Case(name, {**arguments, **more}).make(lr_scheduler, held)
        assert held.state_dict() == before


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "ReduceLROnPlateau", "LambdaLR", "SWALR"])
def test_what_is_no_optimizer(name):
    arguments = {
        "StepLR": {"step_size": 3},
        "OneCycleLR": {"max_lr": 1.0, "total_steps": 9},
        "LambdaLR": {"lr_lambda": [abs]},
        "SWALR": {"swa_lr": 0.1},
    }.get(name, {})
    with pytest.raises(TypeError, match=r"^SimpleNamespace is not an Optimizer"):
        getattr(lr_scheduler, name)(SimpleNamespace(param_groups=[{"lr": 0.1}]), **arguments)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case("ConstantLR", {"total_iters": 0}), "total_iters value: 0"),
        (Case("LinearLR", {"total_iters": -1}), "total_iters value: -1"),
        (Case("LinearLR", {"start_factor": math.nan}), "Starting multiplicative"),
        (Case("ConstantLR", {"factor": math.nan}), "Constant multiplicative"),
        (Case("PolynomialLR", {"total_iters": 0}), "total_iters value: 0"),
        (Case("PolynomialLR", {"power": math.nan}), "power value: nan"),
        (Case("CosineAnnealingLR", {"T_max": 0}), "T_max value: 0"),
        (Case("CosineAnnealingLR", {"T_max": 5, "eta_min": math.nan}), "eta_min value: nan"),
        (Case("CosineAnnealingWarmRestarts", {"T_0": 5, "eta_min": math.nan}), "eta_min"),
        (Case("ExponentialLR", {"gamma": math.nan}), "gamma value: nan"),
        (Case("MultiStepLR", {"milestones": [5, 3]}), r"ascending order: \[3, 5\]"),
        (Case("MultiStepLR", {"milestones": [-1]}), "milestones value: -1"),
        (Case("CyclicLR", {"base_lr": math.nan, "max_lr": 1.0}), "base_lr value: nan"),
        (Case("CyclicLR", {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 0}), "step_size_up"),
        (Case("OneCycleLR", {"max_lr": math.inf, "total_steps": 5}), "max_lr value: inf"),
        (Case("OneCycleLR", {"max_lr": 1.0, "total_steps": 5, "div_factor": 0}), "div_factor"),
        (Case("ReduceLROnPlateau", {"factor": math.nan}), "Factor should be < 1.0."),
        (Case("ReduceLROnPlateau", {"patience": -1}), "patience value: -1"),
        (Case("SWALR", {"swa_lr": math.nan}), "swa_lr value: nan"),
    ],
)
def test_what_torch_lets_pass(case, words):
    held = optimizer(0.3, 0.2, momentum=0.9)
    before = copy.deepcopy(held.state_dict())
    with pytest.raises(ValueError, match=words):
        case.make(lr_scheduler, held)
    assert held.state_dict() == before


@pytest.mark.parametrize("milestones", [5, 2.5, None])
def test_one_number_in_the_place_of_a_list(milestones):
    held = optimizer(0.3)
    two = parts(lr_scheduler, held)
    words = r"^Invalid milestones value: .*\((\w+): milestones must be a list of whole numbers"
    with pytest.raises(TypeError, match=words):
        lr_scheduler.SequentialLR(held, two, milestones=milestones)
    with pytest.raises(TypeError, match=words):
        lr_scheduler.MultiStepLR(held, milestones=milestones)
    whole = lr_scheduler.SequentialLR(held, two, milestones=[3])
    with pytest.raises(TypeError, match="'_milestones' must be a list of numbers, got "):
        whole.load_state_dict({**whole.state_dict(), "_milestones": milestones})
    words = "^(SequentialLR|ChainedScheduler): schedulers must be a list of schedules, got StepLR"
    alone = lr_scheduler.StepLR(held, 3)
    with pytest.raises(TypeError, match=words):
        lr_scheduler.SequentialLR(held, alone, milestones=[])
    with pytest.raises(TypeError, match=words):
        lr_scheduler.ChainedScheduler(alone)


def test_milestones_of_a_sequence_out_of_order():
    held = optimizer(0.3)
    three = [lr_scheduler.ExponentialLR(held, 0.9) for _ in range(3)]
    with pytest.raises(ValueError, match="ascending order"):
        lr_scheduler.SequentialLR(held, three, milestones=[5, 3])


def test_a_constant_factor_of_zero_comes_back():
    scheduler = lr_scheduler.ConstantLR(optimizer(0.3), factor=0, total_iters=3)
    assert scheduler.preview(5) == [[0.0], [0.0], [0.0], [0.3], [0.3]]


def test_one_cycle_after_its_end():
    scheduler = lr_scheduler.OneCycleLR(optimizer(0.3, momentum=0.9), 1.0, total_steps=5)
    for _ in range(5):
        scheduler.step()
    # one step too many is at the end of the curve
    assert scheduler.get_last_lr() == [1.0 / 25 / 1e4]
    before = copy.deepcopy(scheduler.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^Tried to step 6 times\. The specified number of"):
            scheduler.step()
    assert scheduler.state_dict() == before


def stepping(kind: Any, library: Any = stepwell, **more: Any) -> Any:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    held = getattr(library, kind)([weight], lr=0.1, **more)

    def closure() -> torch.Tensor:
        weight.grad = torch.ones(2, 2)
        return torch.tensor(1.0)

    closure()
    return held, (lambda: held.step(closure)) if kind == "LBFGS" else held.step


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adafactor", "Muon", "LBFGS"])
def test_what_torchs_schedules_leave_is_refused_by_the_step_that_would_use_it(kind):
    held, step = stepping(kind)
    group = held.param_groups[0]
    scheduler = torch_schedulers.OneCycleLR(
        held, 0.1, 10, anneal_strategy="linear", cycle_momentum=False
    )
    for _ in range(10):
        step()
        scheduler.step()
    assert group["lr"] < 0
    before = copy.deepcopy(held.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"earning rate.* -0\.0.*OneCycleLR has left"):
            step()
    assert str(held.state_dict()) == str(before)
    # a file of a training that is over can be loaded, to begin another one with
    other, step_other = stepping(kind)
    other.load_state_dict(copy.deepcopy(before))
    assert other.param_groups[0]["lr"] == group["lr"]
    with pytest.raises(ValueError, match=r"earning rate.* -0\.0.*as it was loaded"):
        step_other()
    for again in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        with pytest.raises(ValueError, match="earning rate"):
            again.step(lambda: torch.tensor(1.0))
    other.param_groups[0]["lr"] = 0.1
    step_other()
    # the user's own writes are checked as ever
    with pytest.raises(ValueError, match=r"earning rate.* -0\.01 "):
        group["lr"] = -0.01
    group["lr"] = 0.1
    step()


def test_a_nan_of_torchs_schedules_is_refused_at_once():
    held, _ = stepping("SGD")
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        torch_schedulers.LambdaLR(held, lambda step: math.nan)


PAIRS = [((4, 0.01), (7, 0.0)), ((7, 0.01), (4, 0.0)), ((3, 0.1), (7, 0.0)), ((3, 0.1), (7, 0.01))]


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("module", [torch_schedulers, lr_scheduler])
@pytest.mark.parametrize("pair", PAIRS)
def test_two_cosines_that_are_stepped_by_hand(pair, module, kind):
    held = optimizer(kind(1.0), kind=stepwell.SGD)
    both = [module.CosineAnnealingLR(held, *arguments) for arguments in pair]
    for _ in range(40):
        held.step()
        for scheduler in both:
            scheduler.step()
        # torch's rates are summed up in float32 too
        assert held.param_groups[0]["lr"] >= (0 if module is lr_scheduler else -1e-6)


def test_a_refusal_names_the_schedule_and_the_step():
    scheduler = lr_scheduler.LambdaLR(optimizer(1.0, kind=stepwell.SGD), lambda t: 1.0 - t)
    scheduler.step()
    with pytest.raises(ValueError, match=r"^Invalid learning rate: -1\.0 .*LambdaLR .* at step 2"):
        scheduler.step()


def test_a_metric_that_is_nan_is_reported_and_no_better():
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer(1.0), factor=0.5, patience=1)
    scheduler.step(2.0)
    for _ in range(2):
        with pytest.warns(UserWarning, match="the metric is NaN, which counts as no better than 2"):
            scheduler.step(torch.tensor(math.nan))
    assert scheduler.best == 2.0
    assert scheduler.get_last_lr() == [0.5]


def test_an_epoch_that_is_none():
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer(1.0), 3)
    before = copy.deepcopy(scheduler.state_dict())
    for epoch in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^Expected non-negative epoch, but got"):
            scheduler.step(epoch)
    assert scheduler.state_dict() == before


def test_a_rate_out_of_range_changes_nothing():
    held = optimizer(1.0, 1.0, kind=stepwell.SGD)
    scheduler = lr_scheduler.LambdaLR(held, [lambda t: 1.0, lambda t: math.nan if t == 2 else 0.5])
    scheduler.step()
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        scheduler.step()
    assert (scheduler.last_epoch, scheduler._step_count) == (1, 2)
    assert [group["lr"] for group in held.param_groups] == [1.0, 0.5]


class TestFunctions:
    def test_that_cannot_be_saved_are_reported(self):
        decay = Decay(0.9)
        decay.helper = lambda: None
        scheduler = lr_scheduler.LambdaLR(optimizer(1.0), decay)
        with pytest.warns(UserWarning, match="lr_lambda 0, a Decay, cannot be saved.*'helper'"):
            scheduler.state_dict()

    def test_given_as_functions_where_objects_were_saved(self):
        saved = lr_scheduler.LambdaLR(optimizer(1.0), Decay(0.9)).state_dict()
        scheduler = lr_scheduler.LambdaLR(optimizer(1.0), lambda step: 1.0)
        with pytest.raises(ValueError, match="attributes of an object as lr_lambda 0"):
            scheduler.load_state_dict(saved)

    def test_without_attributes_are_saved_as_none(self):
        scheduler = lr_scheduler.LambdaLR(optimizer(1.0), math.exp)
        assert scheduler.state_dict()["lr_lambdas"] == [None]


class TestSchedule:
    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            ({"weight_decy": cosine(5)}, ValueError, "'weight_decy'; did you mean 'weight_decay'"),
            ({"warmth": cosine(5)}, ValueError, "no hyperparameter 'warmth'; it has lr, betas"),
            ({"beta[0]": cosine(5)}, ValueError, r"did you mean 'betas\[0\]'\?"),
            ({"betas[2]": cosine(5)}, ValueError, r"no hyperparameter 'betas\[2\]'"),
            ({"betas": cosine(5)}, TypeError, r"'betas' is no number.*name one of .*'betas\[0\]'"),
            ({"amsgrad": cosine(5)}, TypeError, "'amsgrad' is no number but False"),
            ({"lr": 0.1}, TypeError, "lr must be a curve such as .*or dict of curves, got 0.1$"),
            ({"lr": "cosine(5)"}, TypeError, r"got 'cosine\(5\)' \(for text: parse\('cosine"),
            ({}, TypeError, r"^Schedule: give it a curve for at least one hyperparameter"),
            ({"lr": [None, None], "weight_decay": {}}, TypeError, "give it a curve"),
            ({"lr": [cosine(5)]}, ValueError, "lr: got 1 curves for 2 groups"),
            ({"lr": {"heads": cosine(5)}}, ValueError, "no group 'heads'; did you mean 'head'"),
            ({"lr": {2: cosine(5)}}, ValueError, "no group 2; there are 0, 1, 'body', 'head'"),
        ],
    )
    def test_refusals(self, given, error, words):
        held = named(stepwell.AdamW)
        before = copy.deepcopy(held.state_dict())
        with pytest.raises(error, match=words):
            Schedule(held, **given)
        assert held.state_dict() == before

    def test_a_value_out_of_range_changes_nothing(self):
        held = named(stepwell.AdamW)
        schedule = Schedule(held, lr=cosine(5), **{"betas[0]": absolute(linear(0.5, 1.5, 2))})
        before = copy.deepcopy(held.state_dict())
        with pytest.raises(ValueError, match=r"Invalid beta parameter at index 0: 1\.0"):
            schedule.step()
        assert held.state_dict() == before
        assert schedule.last_epoch == 0


def named(kind: Any) -> Any:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "name": name, "lr": rate}
        for name, rate in (("body", 0.1), ("head", 1.0))
    ]
    return kind(groups, weight_decay=0.5)


@pytest.mark.parametrize("library", [torch.optim, stepwell])
def test_schedules_of_any_hyperparameter(library):
    held = named(library.AdamW)
    schedule = Schedule(
        held,
        lr={"head": warmup(1) >> cosine(4), 0: linear(1, 0, 4)},
        weight_decay=[None, cosine(2)],
        **{"betas[0]": absolute(linear(0.5, 0.9, 4)), "betas[1]": linear(1, 0.5, 4)},
    )
    body, head = held.param_groups
    for t in range(9):
        u = min(t / 4, 1)
        assert body["lr"] == pytest.approx(0.1 * (1 - u))
        wave = (1 + math.cos(math.pi * min((t - 1) / 4, 1))) / 2
        assert head["lr"] == pytest.approx(0.5 if t == 0 else wave)
        decay = 0.5 * (1 + math.cos(math.pi * min(t / 2, 1))) / 2
        assert (body["weight_decay"], head["weight_decay"]) == pytest.approx((0.5, decay))
        for group in (body, head):
            assert group["betas"] == pytest.approx((0.5 + 0.4 * u, 0.999 * (1 - 0.5 * u)))
        schedule.step()


def test_preview_moves_nothing():
    held = named(stepwell.AdamW)
    schedule = Schedule(held, lr=cosine(4))
    schedule.step()
    before = copy.deepcopy((held.state_dict(), schedule.state_dict()))
    seen = schedule.preview(4)
    assert (held.state_dict(), schedule.state_dict()) == before
    for rates in seen:
        assert schedule.get_last_lr() == rates
        schedule.step()
