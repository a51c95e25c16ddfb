"""Does torch.distributed.checkpoint save and load our optimizers, on any number of processes?

A training of one process is saved and goes on on two, whose parameters are sharded; what these save
goes on on one. The oracle is the training that was never saved.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

import stepwell

from .cases import numbers
from .processes import in_processes

RULES = {
    "adamw": partial(stepwell.AdamW, lr=0.1),
    # of which a first step makes the momentum, and the second the average
    "averaged": partial(
        stepwell.averaged(stepwell.SGD), lr=0.1, momentum=0.9, average_start=2, average_decay=0.5
    ),
}


class Training(Stateful):
    """A model and its optimizer, as torch's tutorials wrap them for such checkpoints."""

    def __init__(self, rule: str, mesh: Any = None) -> None:
        torch.manual_seed(0 if mesh is None else 1)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
        if mesh is not None:
            fully_shard(self.model, mesh=mesh)
        self.optimizer = RULES[rule](self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )

    def go_on(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            self.model(numbers((4, 6), torch.float32, step)).square().mean().backward()
            self.optimizer.step()

    def assert_close(self, other: Training) -> None:
        for mine, its in zip(self.model.parameters(), other.model.parameters(), strict=True):
            # a gradient is a mean over two processes for some of the steps
            torch.testing.assert_close(mine.detach(), its.detach(), rtol=1e-4, atol=1e-5)
            for name, value in other.optimizer.state[its].items():
                found = self.optimizer.state[mine][name]
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def trainings(mesh: Any = None) -> dict[str, Training]:
    return {rule: Training(rule, mesh) for rule in RULES}


def _go_on(mesh: Any, folder: Path) -> None:
    both = trainings(mesh)
    dcp.load(both, checkpoint_id=folder / "one")
    for training in both.values():
        training.go_on(range(3, 6))
    dcp.save(both, checkpoint_id=folder / "two")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    both, resumed = trainings(), trainings()
    for training in both.values():
        training.go_on(range(3))
    dcp.save(both, checkpoint_id=tmp_path / "one", no_dist=True)
    in_processes(_go_on, tmp_path)
    dcp.load(resumed, checkpoint_id=tmp_path / "two", no_dist=True)
    for rule, training in both.items():
        training.go_on(range(3, 6))
        resumed[rule].assert_close(training)
        for each in (training, resumed[rule]):
            each.go_on(range(6, 8))
        resumed[rule].assert_close(training)


# One process

CLASSES = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {}),
    *((name, {"weight_decay": 0.1}) for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")),
    *((name, {"weight_decay": 0.1}) for name in ("Adagrad", "RMSprop", "Adadelta", "ASGD")),
    ("Adafactor", {}),
    ("Rprop", {}),
    ("Muon", {}),
]
each_class = pytest.mark.parametrize(("name", "options"), CLASSES)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))


def made(library: Any, name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    model = net()
    return model, getattr(library, name)(model.parameters(), **{"lr": 0.01, **options})


def go_on(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(numbers((8, 6), torch.float32, step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
@each_class
def test_what_torchs_class_saved(name: str, options: dict[str, Any], flat: bool) -> None:
    choice = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = made(torch.optim, name, options)
    go_on(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer, options=choice)
    mine, own = made(stepwell, name, options)
    mine.load_state_dict(model.state_dict())
    set_optimizer_state_dict(mine, own, copy.deepcopy(saved), options=choice)
    for pair in ((model, optimizer), (mine, own)):
        go_on(*pair, range(3, 5))
    # Muon multiplies in bfloat16
    tolerance = {"rtol": 5e-3, "atol": 5e-3} if name == "Muon" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(mine.state_dict(), model.state_dict(), **tolerance)


def test_flat_state_dicts_that_lack_a_key_of_the_groups() -> None:
    model, optimizer = made(torch.optim, "RMSprop", {})
    go_on(model, optimizer, range(2))
    mine, own = made(stepwell, "RMSprop", {"fused": True})
    set_optimizer_state_dict(mine, own, get_optimizer_state_dict(model, optimizer))
    assert [state["step"] for state in own.state.values()] == [2, 2]
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=flat)
    with pytest.raises(KeyError, match="fused"):
        set_optimizer_state_dict(mine, own, saved, options=flat)
    saved = get_optimizer_state_dict(mine, own, options=flat)
    twin, other = made(stepwell, "RMSprop", {"fused": True})
    set_optimizer_state_dict(twin, other, saved, options=flat)
    assert [state["step"] for state in other.state.values()] == [2, 2]


def test_what_groups_do_not_list_at_its_default_is_loaded() -> None:
    model, optimizer = made(stepwell, "Muon", {})
    go_on(model, optimizer, range(2))
    saved = get_optimizer_state_dict(model, optimizer)
    mine, own = made(stepwell, "Muon", {"ns_dtype": "float32"})
    set_optimizer_state_dict(mine, own, saved)
    assert own.param_groups[0].get("ns_dtype") is None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["RMSprop", "Adafactor"])
def test_a_file_of_torchs_class(tmp_path: Path, name: str) -> None:
    model, optimizer = made(torch.optim, name, {})
    go_on(model, optimizer, range(2))
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    mine, own = made(stepwell, name, {})
    found = {"optimizer": get_optimizer_state_dict(mine, own)}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(mine, own, found["optimizer"])
    assert [state["step"] for state in own.state.values()] == [2, 2]


@pytest.mark.parametrize("as_tensor", [False, True])
@each_class
def test_to_ask_before_the_first_step_is_no_step(
    name: str, options: dict[str, Any], as_tensor: bool
) -> None:
    """Asking returns all entries and counts no step; the steps after it are as without it."""
    lr = torch.tensor(0.01) if as_tensor else 0.01
    trainings = [made(stepwell, name, {**options, "lr": lr}) for _ in range(2)]
    saved = get_optimizer_state_dict(*trainings[0])
    model, twin = made(torch.optim, name, options)
    expected = get_optimizer_state_dict(model, twin)["state"]
    for key, state in saved["state"].items():
        assert state.keys() == expected[key].keys()
        assert state.get("step", 0) == 0
        moments = [state[k] for k in state if k not in ("step", "mu", "eta", "mu_product")]
        assert not any(m.any() for m in moments if name != "Rprop" and m.numel() > 1)
    assert saved["state"].keys() == expected.keys()
    for each in trainings:
        go_on(*each, range(3))
    for one, other in zip(*(training[0].parameters() for training in trainings), strict=True):
        assert torch.equal(one, other)


def test_a_warm_up_from_zero_is_counted() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = stepwell.AdamW([weight, nn.Parameter(torch.ones(2))], lr=0.0)
    weight.grad = torch.tensor([0.0, 1.0, 0.0])
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    # and so is a step without gradients' worth, once there is state
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2


def test_a_group_of_its_own_rate_is_no_rehearsal() -> None:
    frozen, weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = stepwell.AdamW([{"params": [frozen], "lr": 0.0}, {"params": [weight]}], lr=0.1)
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    assert frozen not in optimizer.state


@pytest.mark.parametrize("combined", [False, True])
@each_class
def test_a_warm_up_from_zero_whose_gradients_are_zero_is_counted(
    name: str, options: dict[str, Any], combined: bool
) -> None:
    """As of layers that start at zero: all looks as in a step that torch takes for the state."""
    results = []
    for library in (torch.optim, stepwell):
        weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
        optimizer = getattr(library, name)([weight], **{"lr": 0.5, **options})
        schedule = library.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
        step = optimizer.step
        if combined and library is stepwell:
            step = stepwell.Combined({"one": optimizer}).step
        for grad in (0.0, 1.0, 1.0):
            weight.grad = torch.full_like(weight, grad)
            step()
            schedule.step()
        results.append(weight.detach())
    tolerance = {"rtol": 0.02, "atol": 0.02} if name == "Muon" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(results[1], results[0], **tolerance)


OWN_RATE = [
    ("Rprop", {}, None),
    ("ASGD", {"weight_decay": 0.1}, None),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}, None),
    ("NAdam", {}, None),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}, "one"),
    ("Rprop", {}, "one"),
]


def with_own_rate(name: str, options: dict[str, Any], combined: Any) -> tuple[nn.Module, Any]:
    """A training whose groups have a rate that is not the constructor's."""
    model = net()
    first, second = ([{"params": [p], "lr": 0.3}] for p in model.parameters())
    rule = partial(getattr(stepwell, name), lr=0.01, **options)
    if combined:
        return model, stepwell.Combined({"one": rule(first), "two": rule(second)})
    return model, rule([*first, *second])


@pytest.mark.parametrize(("name", "options", "combined"), OWN_RATE)
def test_what_nobody_loads_into_begins_at_the_first_step(
    name: str, options: dict[str, Any], combined: Any
) -> None:
    trainings = [with_own_rate(name, options, combined) for _ in range(5)]
    for model, optimizer in trainings[1:]:
        get_optimizer_state_dict(model, optimizer)
    # what is asked for twice, and copies, are no load either
    get_optimizer_state_dict(*trainings[2])
    trainings[3] = copy.deepcopy(trainings[3])
    trainings[4] = pickle.loads(pickle.dumps(trainings[4]))
    for each in trainings:
        go_on(*each, range(3))
    for model, _ in trainings[1:]:
        for one, other in zip(model.parameters(), trainings[0][0].parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("how", ["dcp", "in place", "behind its back", "replaced", "set"])
@pytest.mark.parametrize(("name", "options", "combined"), OWN_RATE)
def test_what_is_loaded_into_goes_on(
    name: str, options: dict[str, Any], combined: Any, how: str, tmp_path: Path
) -> None:
    model, optimizer = with_own_rate(name, options, combined)
    go_on(model, optimizer, range(2))
    saved = get_optimizer_state_dict(model, optimizer)
    mine, own = with_own_rate(name, options, combined)
    mine.load_state_dict(model.state_dict())
    found = get_optimizer_state_dict(mine, own)
    if how == "dcp":
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
        dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    elif how == "set":
        set_optimizer_state_dict(mine, own, copy.deepcopy(saved))
    else:
        for param, other in zip(mine.parameters(), model.parameters(), strict=True):
            for key, value in optimizer.state[other].items():
                if how == "replaced":
                    own.state[param][key] = value.clone()
                else:
                    # a broadcast of torch.distributed does not count as a version either
                    held = own.state[param][key]
                    (held if how == "in place" else held.data).copy_(value)
    for each in ((model, optimizer), (mine, own)):
        go_on(*each, range(2, 4))
    for one, other in zip(mine.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_parameters_that_are_swapped_in_their_lists_leave_no_state_behind() -> None:
    """As accelerate does it under FSDP2, after the constructor has made Adagrad's sums."""
    whole = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = stepwell.Adagrad(whole, lr=0.1, initial_accumulator_value=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    kept = weakref.ref(whole[0])
    for index in range(2):
        optimizer.param_groups[0]["params"][index] = nn.Parameter(torch.ones(2))
    del whole
    saved = optimizer.state_dict()
    gc.collect()
    assert kept() is None
    assert [state["sum"].tolist() for state in saved["state"].values()] == [[0.5, 0.5]] * 2
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones(2)
    optimizer.step()
    assert [state["step"] for state in optimizer.state.values()] == [1, 1]
