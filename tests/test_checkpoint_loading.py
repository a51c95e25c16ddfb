"""What does a load do where file and training are not quite alike, or where something fails midway?

Expected values are written out, or are what torch's own `load_state_dict` makes of the module.
"""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stepwell
from stepwell.checkpoint import CheckpointError, load, save
from stepwell.checkpoint.convert import from_torch
from stepwell.checkpoint.pieces import get_piece, set_piece
from stepwell.language import ClipNorm
from stepwell.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    ReduceLROnPlateau,
    Schedule,
    SequentialLR,
    StepLR,
    cosine,
)

from .compare import assert_same_training, snapshot


def trained(optimizer):
    """The optimizer after one step with gradients of ones."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


# Values of `extra`


def test_conjugates_and_imaginary_parts_are_no_copies_of_what_they_are_of(path):
    x = torch.tensor([1 + 2j, 3 - 4j])
    save(path, extra=[x, x.conj(), x.imag, x.conj().imag, x])
    loaded = load(path).extra
    expected = [[1 + 2j, 3 - 4j], [1 - 2j, 3 + 4j], [2.0, -4.0], [-2.0, 4.0], [1 + 2j, 3 - 4j]]
    assert [tensor.tolist() for tensor in loaded] == expected


def test_values_that_no_file_can_hold_are_named(path):
    loop = {"list": []}
    loop["list"].append(loop)
    deep = 1
    for _ in range(100):
        deep = {"a": deep}
    save(path, extra=deep)
    assert load(path).extra == deep
    for value, words in (
        (loop, r"extra.list.0 \(dict\) contains itself"),
        ([deep], r"extra.0.a.* lies in 100 containers"),
        ({"n": 10**5000}, r"extra.n is a number of 16,610 bits, a checkpoint holds 14,000"),
    ):
        with pytest.raises(ValueError, match=words):
            save(path, extra=value)
    assert load(path).extra == deep


def test_names_that_collide_are_numbered(path):
    tensors = {float("nan"): torch.full((2,), float(i)) for i in range(4)}
    save(path, extra=tensors)
    assert [t.tolist() for t in load(path).extra.values()] == [[i, i] for i in range(4)]


def test_tensors_are_on_the_host_whatever_the_default_device_is(path):
    save(path, extra=[torch.arange(4.0), torch.tensor(2.0)], with_random_state=True)
    with torch.device("meta"):
        loaded = load(path, with_random_state=True).extra
    assert loaded[0].tolist() == [0, 1, 2, 3]
    assert loaded[1].item() == 2


# Tied tensors


class Pair(nn.Module):
    """Two matrices that may be one; large ones are read to where they belong."""

    def __init__(self, order="ab", tied=False, transposed=False, size=300):
        super().__init__()
        for name in order:
            weight = torch.randn(size, size)
            self.register_parameter(name, nn.Parameter(weight.t() if transposed else weight))
        if tied:
            self.register_parameter(order[1], getattr(self, order[0]))


def test_two_tensors_do_not_become_one(path):
    for size in (3, 300):
        model, tied = Pair(size=size), Pair(tied=True, size=size)
        before = tied.a.clone()
        save(path, model=model)
        with pytest.raises(CheckpointError, match="b and a are one tensor in the model"):
            load(path, model=tied)
        assert torch.equal(tied.a, before)
        # what is the same to the bit is one
        model.b.data.copy_(model.a)
        save(path, model=model)
        load(path, model=tied)
        assert torch.equal(tied.a, model.a)


def test_one_tensor_becomes_two(path):
    model = Pair(tied=True, size=700)
    save(path, model=model)
    for transposed in (False, True):
        untied = Pair(transposed=transposed, size=700)
        load(path, model=untied)
        assert torch.equal(untied.a, model.a)
        assert torch.equal(untied.b, model.a)


def test_tied_parameters_may_be_registered_in_another_order(path):
    model, other = Pair("ab", tied=True), Pair("ba", tied=True)
    optimizer = trained(stepwell.AdamW(model.parameters()))
    save(path, model=model, optimizer=optimizer)
    resumed = stepwell.AdamW(other.parameters())
    assert load(path, model=other, optimizer=resumed).report.is_empty
    assert torch.equal(resumed.state[other.a]["exp_avg"], optimizer.state[model.a]["exp_avg"])
    # the file knows both names, although the model is not loaded
    for names in ("a", "b"):
        alone = stepwell.AdamW([(names, other.a)])
        load(path, optimizer=alone)
        assert torch.equal(alone.state[other.a]["exp_avg"], optimizer.state[model.a]["exp_avg"])


# Wrappers


def test_wrappers_may_be_anywhere_on_either_side(path):
    def make(wrap=lambda part: part, whole=lambda model: model):
        return whole(nn.Sequential(wrap(nn.Linear(2, 2)), nn.Linear(2, 2)))

    compiled = partial(torch.compile, backend="eager")
    wrapped = [
        make(),
        make(wrap=compiled),
        make(wrap=nn.DataParallel),
        make(whole=nn.DataParallel),
        make(whole=compiled),
    ]
    for model in wrapped:
        optimizer = trained(stepwell.AdamW(model.named_parameters()))
        save(path, model=model, optimizer=optimizer, averaged=model)
        for other in wrapped:
            resumed = stepwell.AdamW(other.named_parameters())
            names = resumed.param_groups[0]["param_names"]
            loaded = load(path, model=other, optimizer=resumed, averaged=other)
            assert loaded.report.is_empty
            assert resumed.param_groups[0]["param_names"] == names
            for one, two in zip(other.parameters(), model.parameters(), strict=True):
                assert torch.equal(one, two)
                assert len(resumed.state[one]) == 3


def test_what_wrappers_put_before_all_names_is_known_without_a_model(path):
    model, plain = nn.DataParallel(nn.Linear(2, 2)), nn.Linear(2, 2)
    for one, other in ((model, plain), (plain, model)):
        save(path, optimizer=trained(stepwell.AdamW(one.named_parameters())))
        resumed = stepwell.AdamW(other.named_parameters())
        load(path, optimizer=resumed)
        assert len(resumed.state) == 2


# Names


def nested():
    """Two layers, of which the model calls the second "1.0" and its own parent calls it "0"."""
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))


def test_names_that_repeat_are_refused_unless_the_model_has_others(path):
    pair, other = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    optimizer = trained(stepwell.AdamW(pair.named_parameters()))
    save(path, model=pair, optimizer=optimizer)
    twice = stepwell.AdamW([*other[1].named_parameters(), *other[0].named_parameters()], lr=0.5)
    with pytest.raises(ValueError, match=r"weight is listed twice in the optimizer.*pass model="):
        load(path, optimizer=twice)
    assert twice.param_groups[0]["lr"] == 0.5
    assert not twice.state
    assert load(path, optimizer=twice, model=other).report.is_empty
    for saved, param in zip(pair.parameters(), other.parameters(), strict=True):
        assert torch.equal(twice.state[param]["exp_avg"], optimizer.state[saved]["exp_avg"])


def test_a_hook_that_takes_the_names_does_not_lead_to_another_order(path):
    def without_names(_, state_dict):
        groups = [{**group} for group in state_dict["param_groups"]]
        for group in groups:
            del group["param_names"]
        return {**state_dict, "param_groups": groups}

    model = nn.Linear(2, 2)
    save(path, optimizer=trained(stepwell.AdamW(model.named_parameters())))
    target = stepwell.AdamW([*model.named_parameters()][::-1])
    target.register_load_state_dict_pre_hook(without_names)
    with pytest.raises(CheckpointError, match="a hook has taken the param_names"):
        load(path, optimizer=target)
    assert not target.state


@pytest.mark.parametrize("own", ["saved", "loaded", "both"])
def test_a_name_that_the_model_gives_to_another_parameter_is_not_taken(path, own):
    model, other = nested(), nested()

    def inner(model, named):
        return stepwell.AdamW(model[1].named_parameters() if named else model[1].parameters())

    optimizer, target = inner(model, own != "loaded"), inner(other, own != "saved")
    save(path, model=model, optimizer=trained(optimizer))
    assert load(path, model=other, optimizer=target).report.is_empty
    saved, param = model[1][0].weight, other[1][0].weight
    assert torch.equal(target.state[param]["exp_avg"], optimizer.state[saved]["exp_avg"])
    # and the file says whose it is
    whole = stepwell.AdamW(other.parameters())
    load(path, model=other, optimizer=whole, strict=False)
    assert {id(p) for p in whole.state} == {id(p) for p in other[1].parameters()}


# Renames


def test_names_can_be_swapped(path):
    model, other = Pair(size=3), Pair(size=3)
    save(path, model=model)
    load(path, model=other, rename={"^a$": "b", "^b$": "a"})
    assert torch.equal(other.a, model.b)
    assert torch.equal(other.b, model.a)


@pytest.mark.parametrize(
    ("rename", "error", "words"),
    [
        ([("a", "b")], TypeError, "rename must be a dict of regular expressions .* got list"),
        ({"(": "x"}, ValueError, "rename has '\\(': 'x': missing \\)"),
        ({"a": r"\1"}, ValueError, "invalid group reference"),
        ({"a": 3}, TypeError, "rename must hold texts, got 'a': 3"),
    ],
)
def test_renames_that_are_none(path, rename, error, words):
    save(path, model=Pair())
    with pytest.raises(error, match=words):
        load(path, model=Pair(), rename=rename)


# What cannot be written, or is of another kind


def test_models_without_memory_are_refused(path):
    save(path, model=nn.Linear(4, 4))
    with torch.device("meta"):
        on_meta = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match=r"weight is on the meta device.*to_empty"):
        load(path, model=on_meta)
    assert len(load(path, model=on_meta, strict=False).report.mismatched) == 2
    with pytest.raises(CheckpointError, match="weight has no shape yet: pass data through"):
        load(path, model=nn.LazyLinear(4))
    with pytest.raises(TypeError, match=r"model.weight has no shape yet: pass data through"):
        save(path, model=nn.LazyLinear(4))


@pytest.mark.parametrize("size", [3, 300])
def test_expanded_buffers_are_refused_before_anything_is_changed(path, size):
    def make():
        model = nn.Linear(2, 2)
        model.register_buffer("mask", torch.rand(1, size).expand(size, size))
        return model, stepwell.SGD(model.parameters(), lr=torch.rand(()).item())

    (model, optimizer), (other, target) = make(), make()
    before, lr = other.weight.clone(), target.param_groups[0]["lr"]
    save(path, model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="mask is expanded"):
        load(path, model=other, optimizer=target)
    assert torch.equal(other.weight, before)
    assert target.param_groups[0]["lr"] == lr


def test_conjugate_buffers_are_refused(path):
    model = nn.Module()
    model.register_buffer("x", torch.rand(300, 300, dtype=torch.complex64).conj())
    save(path, model=model)
    with pytest.raises(CheckpointError, match="x is a conjugate of other memory"):
        load(path, model=model)


def test_whole_numbers_do_not_become_others(path):
    model, other = nn.Module(), nn.Module()
    model.register_buffer("index", torch.arange(3))
    other.register_buffer("index", torch.zeros(3))
    save(path, model=model)
    for dtype in ("saved", "param", torch.float16):
        with pytest.raises(CheckpointError, match=r"index is torch.int64, must be torch.float32"):
            load(path, model=other, dtype=dtype)


def test_what_is_no_module_is_refused_at_the_door(path):
    model = nn.Linear(2, 2)
    for part in ("model", "averaged"):
        with pytest.raises(TypeError, match=f"save: {part} must be a torch.nn.Module, got Ordered"):
            save(path, **{part: model.state_dict()})
        save(path, model=model)
        with pytest.raises(TypeError, match=f"load: {part} must be a torch.nn.Module, got Ordered"):
            load(path, **{part: model.state_dict()})


def test_nothing_is_not_saved(path):
    for given in ({}, {"extra": None}, {"keep": 3}):
        with pytest.raises(TypeError, match=r"^save: nothing to save: pass model=, optimizer=, "):
            save(path, **given)
    assert not path.exists()
    save(path, extra={})


def test_what_is_no_schedule_is_refused_at_the_door(path):
    optimizer = stepwell.SGD(nn.Linear(2, 2).named_parameters(), lr=0.1)
    scheduler = stepwell.lr_scheduler.StepLR(optimizer, 2)
    save(path.with_name("whole"), optimizer=optimizer, scheduler=scheduler)
    for given, got in (
        ([scheduler], "list"),
        (scheduler.state_dict(), "dict"),
        (stepwell.lr_scheduler.StepLR, "the class StepLR"),
    ):
        words = rf"scheduler must be one schedule, .* load_state_dict\(\), got {got}$"
        with pytest.raises(TypeError, match=f"^save: {words}"):
            save(path, scheduler=given)
        with pytest.raises(TypeError, match=f"^load: {words}"):
            load(path.with_name("whole"), optimizer=optimizer, scheduler=given)
    assert not path.exists()


# Inference mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_in_inference_mode_can_be_trained(path, dtype):
    model = nn.Linear(300, 300)
    save(path, model=model, optimizer=trained(stepwell.AdamW(model.named_parameters())))
    other = nn.Linear(300, 300, dtype=dtype)
    resumed = stepwell.AdamW(other.named_parameters())
    with torch.inference_mode():
        load(path, model=other, optimizer=resumed, dtype="param")
    assert torch.equal(other.weight, model.weight.to(dtype))
    entries = [value for state in resumed.state.values() for value in state.values()]
    assert not any(value.is_inference() for value in entries)
    trained(resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_made_in_inference_mode(path, dtype):
    model = nn.Linear(300, 300)
    save(path, model=model)
    with torch.inference_mode():
        other = nn.Linear(300, 300, dtype=dtype)
    load(path, model=other, dtype="param")
    assert torch.equal(other.weight, model.weight.to(dtype))
    assert torch.equal(other.bias, model.bias.to(dtype))


# All or nothing


class Fragile(nn.Linear):
    """Has a version beside its tensors, and takes no negative one."""

    def __init__(self, version):
        super().__init__(300, 300)
        self.version = version

    def get_extra_state(self):
        return {"version": self.version, "table": torch.full((20_000,), float(self.version))}

    def set_extra_state(self, state):
        self.version = state["version"]
        self.table = state["table"]
        if self.version < 0:
            raise KeyError("no such version")


class Moody(StepLR):
    """Refuses states as often as it is told to, after it has taken them."""

    moods: ClassVar[list[bool]] = []

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.moods and self.moods.pop():
            raise RuntimeError("not today")


def training(version):
    torch.manual_seed(abs(version))
    model = nn.Sequential(Fragile(abs(version)), Fragile(version))
    optimizer = stepwell.AdamW(model.parameters(), lr=0.25 + abs(version))
    scheduler = Moody(optimizer, 1)
    trained(optimizer)
    scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def all_of(parts):
    """Copies of what a load may change, but for the state of the optimizer."""
    model, optimizer, scheduler = parts.values()
    tensors = {name: v.clone() for name, v in model.named_parameters()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    versions = [part.version for part in model]
    return tensors, repr((groups, scheduler.state_dict(), versions))


def assert_unchanged(parts, before, state):
    after = all_of(parts)
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert_same_training(snapshot(parts["optimizer"]), state, "the optimizer")


def test_what_modules_have_beside_tensors_comes_with_large_tensors(path):
    save(path, model=training(3)["model"])
    model = training(1)["model"]
    load(path, model=model)
    assert [part.version for part in model] == [3, 3]
    assert model[1].table.tolist() == [3.0] * 20_000


def refuse(*_):
    raise ValueError("the hook says no")


@pytest.mark.parametrize("culprit", ["extra state", "scheduler", "hook of the optimizer"])
def test_code_of_others_that_fails_midway_leaves_all_as_it_was(path, culprit, monkeypatch):
    save(path, **training(-1 if culprit == "extra state" else 1))
    parts = training(5)
    # the first time, it is tried on a copy
    monkeypatch.setattr(Moody, "moods", [culprit == "scheduler", False])
    if culprit == "hook of the optimizer":
        parts["optimizer"].register_load_state_dict_post_hook(refuse)
    before, state = all_of(parts), snapshot(parts["optimizer"])
    words = {"extra state": "no such version", "scheduler": "not today"}.get(culprit, "says no")
    with pytest.raises(CheckpointError, match=rf"{words}.*\(nothing was loaded\)") as caught:
        load(path, **parts)
    assert str(path) in str(caught.value)
    assert_unchanged(parts, before, state)
    trained(parts["optimizer"])


def test_a_hook_of_the_model_that_fails_comes_last_and_says_so(path):
    save(path, **training(1), with_random_state=True)
    drawn = torch.rand(())
    parts = training(5)
    parts["model"].register_load_state_dict_post_hook(refuse)
    with pytest.raises(RuntimeError, match=r"everything was loaded; then .* the hook says no"):
        load(path, **parts, with_random_state=True)
    assert torch.equal(torch.rand(()), drawn)
    expected = training(1)
    assert_unchanged(parts, all_of(expected), snapshot(expected["optimizer"]))


# What modules do as they load


class Renamed(nn.Linear):
    """Once called its weight `kernel` and had it transposed; keeps a sum of it."""

    def __init__(self, size, way):
        super().__init__(size, size, bias=False)
        self.way = way
        self.register_load_state_dict_pre_hook(self.from_before)
        self.register_load_state_dict_post_hook(lambda module, keys: module.add_up())
        self.add_up()

    def add_up(self):
        self.total = self.weight.detach().sum()

    def from_before(self, _, state_dict, prefix, *__):
        kernel = state_dict.pop(prefix + "kernel", None)
        if kernel is not None and self.way == "hook":
            state_dict[prefix + "weight"] = kernel

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if prefix + "kernel" in state_dict and self.way == "override":
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").t()
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.parametrize("way", ["hook", "override"])
@pytest.mark.parametrize("size", [3, 300])
def test_older_names_are_read_as_torch_reads_them(path, size, way):
    old = nn.Module()
    old.layer = nn.Module()
    old.layer.kernel = nn.Parameter(torch.randn(size, size))
    save(path, model=old)
    model, twin = (nn.Sequential() for _ in range(2))
    for each in (model, twin):
        each.layer = Renamed(size, way)
    assert load(path, model=model).report.is_empty
    twin.load_state_dict(old.state_dict())
    assert torch.equal(model.layer.weight, twin.layer.weight)
    assert torch.equal(model.layer.total, twin.layer.total)


def test_batch_norms_of_old_files_have_counted_nothing(path):
    old, model = nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3))
    del old.num_batches_tracked
    model[0].num_batches_tracked += 7
    save(path, model=nn.Sequential(old))
    load(path, model=model)
    assert model[0].num_batches_tracked == 7


# Schedules, and whatever else is saved as one


def test_whatever_has_a_state_dict_can_be_saved_as_a_scheduler(path):
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=s) for s in (8.0, 2.0))
    save(path, scheduler=scaler)
    load(path, scheduler=other)
    assert other.get_scale() == 8.0


TWO = {"0": 0.5, "1": 0.125}
"""The rates of two groups, by the prefix of the names in them."""


def scheduled(make, order="01", named=True, merged=False):
    """A model, an optimizer with groups in this order, and its schedule."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parts = {name: part.named_parameters(name) for name, part in model.named_children()}
    listed = {name: list(each if named else dict(each).values()) for name, each in parts.items()}
    groups = [{"params": listed[name], "lr": TWO[name]} for name in order]
    if merged:
        groups = [{"params": [param for group in groups for param in group["params"]], "lr": 0.5}]
    optimizer = stepwell.SGD(groups)
    return model, optimizer, make(optimizer)


def next_rates(model, optimizer, schedule):
    trained(optimizer)
    schedule.step()
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def in_two_parts(optimizer):
    return SequentialLR(optimizer, [StepLR(optimizer, 1), StepLR(optimizer, 2)], [4])


@pytest.mark.parametrize("way", ["names", "the model's names"])
@pytest.mark.parametrize("make", [partial(StepLR, step_size=1), in_two_parts])
def test_a_schedule_that_is_loaded_alone_finds_its_groups(path, make, way):
    training = scheduled(make)
    next_rates(*training)
    model, optimizer, schedule = training
    save(path, model=model, optimizer=optimizer, scheduler=schedule)
    resumed = scheduled(make, order="10", named=way == "names")
    load(path, model=resumed[0], optimizer=resumed[1])
    given = {} if way == "names" else {"model": resumed[0]}
    assert load(path, scheduler=resumed[2], **given).report.is_empty
    for _ in range(6):
        assert next_rates(*resumed) == next_rates(*training)


@pytest.mark.parametrize("merged", [False, True])
def test_initial_values_go_with_their_groups(path, merged):
    make = partial(Schedule, weight_decay=cosine(9))
    model, optimizer, _ = scheduled(make)
    for group, decay in zip(optimizer.param_groups, (0.5, 0.25), strict=True):
        group.update(weight_decay=decay, initial_weight_decay=decay, lr=0.5, initial_lr=0.5)
    schedule = make(optimizer)
    save(path, model=model, optimizer=optimizer, scheduler=schedule)
    other, target, resumed = scheduled(make, **({"merged": True} if merged else {"order": "10"}))
    if merged:
        with pytest.raises(CheckpointError, match=r"whose weight_decay differ \(0.5, 0.25\)"):
            load(path, model=other, optimizer=target, scheduler=resumed)
        return
    load(path, model=other, optimizer=target, scheduler=resumed)
    assert resumed.initial_values == {"weight_decay": [0.25, 0.5]}


def test_a_schedule_whose_groups_cannot_be_known_is_refused(path):
    model, optimizer, schedule = scheduled(partial(StepLR, step_size=1))
    save(path, model=model, optimizer=optimizer, scheduler=schedule)
    _, _, unnamed = scheduled(partial(StepLR, step_size=1), order="10", named=False)
    with pytest.raises(CheckpointError, match="which is whose is not known without the names"):
        load(path, scheduler=unnamed)
    _, _, other = scheduled(partial(StepLR, step_size=1))
    with pytest.raises(CheckpointError, match="group 1: its parameters are not in the file"):
        load(path, scheduler=other, rename={"^1": "2"})


def test_rates_of_a_schedule_that_differ_do_not_become_one(path):
    floors = [0.25, 0.0625]
    model, optimizer, schedule = scheduled(partial(ReduceLROnPlateau, min_lr=floors))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    save(path, model=model, optimizer=optimizer, scheduler=schedule)
    make = partial(ReduceLROnPlateau, min_lr=0.03125)
    other, target, merged = scheduled(make, merged=True)
    with pytest.raises(CheckpointError, match=r"whose min_lrs differ \(0.25, 0.0625\)"):
        load(path, model=other, optimizer=target, scheduler=merged)
    assert merged.min_lrs == [0.03125]
    load(path, optimizer=target, scheduler=merged, strict=False)
    assert merged.min_lrs == [0.25]


def test_the_state_of_one_schedule_is_not_taken_for_that_of_another(path):
    optimizer = stepwell.SGD(nn.Linear(2, 2).named_parameters(), lr=0.5)
    save(path, scheduler=CosineAnnealingLR(optimizer, 10))
    schedule = StepLR(optimizer, 3)
    before = schedule.state_dict()
    with pytest.raises(CheckpointError, match="state of CosineAnnealingLR, not StepLR"):
        load(path, scheduler=schedule)
    assert load(path, scheduler=schedule, strict=False).report.mismatched
    assert schedule.state_dict() == before
    # those of torch have the same names
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    load(path, scheduler=theirs)
    assert theirs.T_max == 10
    save(path, scheduler=in_two_parts(optimizer))
    parts = [StepLR(optimizer, 1), CosineAnnealingLR(optimizer, 2)]
    with pytest.raises(CheckpointError, match=r"state of SequentialLR\(StepLR, StepLR\), not"):
        load(path, scheduler=SequentialLR(optimizer, parts, [4]))


class Trainer:
    """Has what cannot be copied, and a rate."""

    def __init__(self):
        self.lock = threading.Lock()
        self.model = nn.Linear(2, 2)
        self.factor = 0.5

    def __deepcopy__(self, _):
        raise MemoryError("a model is copied")

    def rate(self, step):
        return self.factor**step


class Called(Trainer):
    """A rate that is an object, whose attributes are in the state of its schedule."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, step):
        return self.rate(step)


class MoodyLambda(LambdaLR):
    """Refuses states as often as it is told to, after it has taken them."""

    moods: ClassVar[list[bool]] = []

    def _take_state(self, state):
        super()._take_state(state)
        if self.moods and self.moods.pop():
            raise RuntimeError("not today")


def stated(state, name):
    """What is saved as a schedule of a class of this name, with this state."""
    methods = {"state_dict": lambda self: state, "load_state_dict": lambda self, state: None}
    return type(name, (), methods)()


@pytest.mark.parametrize("library", [stepwell.lr_scheduler, torch.optim.lr_scheduler])
def test_what_a_schedule_calls_is_not_copied(path, library):
    trainer = Trainer()
    optimizer = stepwell.SGD(trainer.model.named_parameters(), lr=1.0)
    schedule = library.LambdaLR(optimizer, trainer.rate)
    schedule.trainer, rate = trainer, schedule.lr_lambdas[0]
    next_rates(trainer.model, optimizer, schedule)
    state = {key: value for key, value in schedule.state_dict().items() if key != "trainer"}
    save(path, optimizer=optimizer, scheduler=stated(state, "LambdaLR"))
    next_rates(trainer.model, optimizer, schedule)
    load(path, optimizer=optimizer, scheduler=schedule)
    assert schedule.last_epoch == 1
    assert schedule.lr_lambdas[0] is rate
    assert schedule.trainer is trainer


def test_an_undone_load_leaves_the_very_parts_and_what_they_call(path, monkeypatch):
    def make(factor):
        optimizer = stepwell.SGD(nn.Linear(2, 2).named_parameters(), lr=1.0)
        called = Called(factor)
        parts = [MoodyLambda(optimizer, called), StepLR(optimizer, 2)]
        return optimizer, called, parts, SequentialLR(optimizer, parts, [4])

    saved, _, _, theirs = make(0.25)
    save(path, optimizer=saved, scheduler=theirs)
    optimizer, called, parts, ours = make(0.5)
    # the first time, it is tried on a copy
    monkeypatch.setattr(MoodyLambda, "moods", [True, False])
    with pytest.raises(CheckpointError, match="not today"):
        load(path, optimizer=optimizer, scheduler=ours)
    assert all(one is other for one, other in zip(ours._schedulers, parts, strict=True))
    assert parts[0].lr_lambdas == [called]
    assert called.factor == 0.5
    load(path, optimizer=optimizer, scheduler=ours)
    assert called.factor == 0.25


class Free(StepLR):
    """Keeps whatever it likes, and has a property."""

    def __init__(self, optimizer):
        self.phase, self.ends, self.mixed = 0, 1, [1, "x"]
        super().__init__(optimizer, 1)

    @property
    def size(self):
        return self.step_size

    @size.setter
    def size(self, value):
        self.step_size = value


def test_attributes_may_change_their_kind_while_training(path):
    optimizer = stepwell.SGD(nn.Linear(2, 2).named_parameters(), lr=1.0)
    schedule, other = Free(optimizer), Free(optimizer)
    schedule.phase, schedule.ends = "done", [1.0]
    save(path, scheduler=schedule)
    load(path, scheduler=other)
    assert (other.phase, other.ends, other.mixed) == ("done", [1.0], [1, "x"])
    for name in ("size", "step"):
        save(path, scheduler=stated({**schedule.state_dict(), name: 3}, "Free"))
        with pytest.raises(CheckpointError, match=f"it has {name}, which are no state"):
            load(path, scheduler=other)
    assert other.size == 1


# Rules


def converted(path, optimizer, model):
    """A file of a state dict that does not say which rule it is of, as torch's do not."""
    from_torch(optimizer.state_dict(), path, [n for n, _ in model])


@pytest.mark.parametrize(
    ("saved", "target", "words"),
    [
        (("Adam", {}), "AdamW", "decoupled_weight_decay=False, which is True for AdamW"),
        (("AdamW", {}), "Adam", None),
        (("Adam", {}), "RAdam", "amsgrad=False, which RAdam does not have"),
        (("Adam", {}), "NAdam", "amsgrad=False, which NAdam does not have"),
        (("RAdam", {}), "Adam", "no amsgrad, which Adam has"),
        (("RAdam", {}), "AdamW", "no amsgrad, which AdamW has"),
        (("NAdam", {}), "RAdam", "momentum_decay=0.004, which RAdam does not have"),
        (("Adamax", {}), "Adamax", None),
        (("SGD", {"momentum": 0.9}), "SGD", None),
    ],
    ids=str,
)
def test_a_file_that_does_not_say_its_rule_is_known_by_its_hyperparameters(
    path, saved, target, words
):
    name, options = saved
    model = list(nn.Linear(3, 3).named_parameters())
    theirs = trained(getattr(torch.optim, name)([p for _, p in model], lr=0.5, **options))
    converted(path, theirs, model)
    resumed = getattr(stepwell, target)(model, lr=0.125)
    if words is None:
        assert load(path, optimizer=resumed).report.is_empty
        return
    with pytest.raises(CheckpointError, match=words):
        load(path, optimizer=resumed)
    assert not load(path, optimizer=resumed, strict=False).report.is_empty
    assert resumed.param_groups[0]["lr"] == 0.125
    assert not resumed.state


def test_what_a_rule_is_composed_with_is_in_the_file(path):
    model = list(nn.Linear(3, 3).named_parameters())
    plain, averaged = stepwell.AdamW, stepwell.averaged(stepwell.AdamW)
    clipped = stepwell.compose(stepwell.AdamW, ClipNorm)
    for saved, target, words in (
        (averaged, plain, r"average, n_averaged of Average"),
        (plain, averaged, r"missing: weight: average"),
        (clipped, plain, r"group 0: max_norm=1.0, which AdamW does not have"),
    ):
        save(path, optimizer=trained(saved(model)))
        with pytest.raises(CheckpointError, match=words):
            load(path, optimizer=target(model))
    save(path, optimizer=trained(plain(model)))
    load(path, optimizer=clipped(model))


@pytest.mark.parametrize("key", ["alpha", "momentum", "max_norm"])
def test_what_users_have_in_groups_is_no_hyperparameter_of_another_rule(path, key):
    model = list(nn.Linear(3, 3).named_parameters())
    save(path, optimizer=trained(stepwell.AdamW([{"params": model, key: 3}])))
    target = stepwell.AdamW(model)
    assert load(path, optimizer=target).report.is_empty
    assert target.param_groups[0][key] == 3


# Partial loads


def test_nothing_of_another_rule_is_taken(path):
    model = list(nn.Linear(3, 3).named_parameters())
    save(path, optimizer=trained(stepwell.SGD(model, lr=0.5, momentum=0.9, nesterov=True)))
    target = trained(stepwell.AdamW(model, lr=0.125))
    before, state = dict(target.param_groups[0]), snapshot(target)
    report = load(path, optimizer=target, strict=False).report
    assert report.mismatched == ("the rule: the file has state of SGD, not AdamW",)
    assert dict(target.param_groups[0]) == before
    assert_same_training(snapshot(target), state, "the optimizer")


def test_nor_are_rates_of_its_schedule(path):
    model = list(nn.Linear(3, 3).named_parameters())
    theirs, ours = stepwell.SGD(model, lr=0.5), stepwell.AdamW(model, lr=0.125)
    save(path, optimizer=theirs, scheduler=StepLR(theirs, 7))
    schedule = StepLR(ours, 3)
    report = load(path, optimizer=ours, scheduler=schedule, strict=False).report
    assert report.mismatched[-1] == "scheduler: it was one of another rule"
    assert (schedule.step_size, schedule.base_lrs) == (3, [0.125])


def test_a_group_of_new_parameters_keeps_its_rate(path):
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "old": nn.Linear(3, 2)})
    groups = [list(part.named_parameters(name)) for name, part in model.items()]
    save(path, optimizer=trained(stepwell.SGD([{"params": g} for g in groups], lr=0.5)))
    head = list(nn.Linear(3, 4).named_parameters("head"))
    target = stepwell.SGD([{"params": groups[0]}, {"params": head}], lr=0.125)
    load(path, optimizer=target, strict=False)
    assert [group["lr"] for group in target.param_groups] == [0.5, 0.125]


def test_a_parameter_of_another_shape_begins_anew(path):
    named, larger = [("a", nn.Parameter(torch.ones(3)))], [("a", nn.Parameter(torch.ones(4)))]
    new = ("b", nn.Parameter(torch.ones(2)))
    save(path, optimizer=trained(stepwell.AdamW(named)))
    target = trained(stepwell.AdamW([*larger, new]))
    report = load(path, optimizer=target, strict=False).report
    assert report.missing == ("b",)
    assert "a: has shape [3] in the file, [4] in the optimizer" in report.mismatched
    # one that the file does not know keeps what it has
    assert [*target.state] == [new[1]]


def test_a_parameter_of_another_dtype_begins_anew_unless_a_dtype_is_given(path):
    model, half = nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)
    save(path, optimizer=trained(stepwell.AdamW(model.named_parameters(), lr=0.5)))
    target = trained(stepwell.AdamW(half.named_parameters()))
    report = load(path, optimizer=target, strict=False).report
    assert [words.partition(" in ")[0] for words in report.mismatched] == [
        "weight: is float32",
        "bias: is float32",
    ]
    assert not target.state
    assert target.param_groups[0]["lr"] == 0.5
    assert load(path, optimizer=target, dtype="param").report.is_empty
    assert target.state[half.weight]["exp_avg"].dtype == torch.bfloat16


def test_an_optimizer_of_parameters_without_memory_is_refused(path):
    save(path, optimizer=trained(stepwell.AdamW(nn.Linear(2, 2).named_parameters(), lr=0.5)))
    target = stepwell.AdamW(nn.Linear(2, 2, device="meta").named_parameters(), lr=0.125)
    for dtype in ("saved", "param"):
        with pytest.raises(CheckpointError, match=r"weight: is on the meta device.*to_empty"):
            load(path, optimizer=target, dtype=dtype)
    assert target.param_groups[0]["lr"] == 0.125
    assert len(load(path, optimizer=target, strict=False).report.mismatched) == 2
    assert not target.state


# Groups that are put together, or split


class Incomparable:
    """Does not say whether it is another one."""

    def __eq__(self, _):
        raise RuntimeError("not comparable")

    __hash__ = None

    def __repr__(self):
        return "incomparable"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([np.arange(3), np.arange(3)], None),
        ([np.arange(3), np.arange(1, 4)], r"tag \(\[0 1 2\], \[1 2 3\]\)"),
        ([{"a": torch.arange(3)}, {"a": torch.arange(3)}], None),
        ([{"a": torch.arange(3)}, {"a": torch.arange(1, 4)}], "tag"),
        ([torch.arange(3), torch.arange(1, 4)], r"tag \(a tensor of shape \(3,\), a tensor of"),
        ([torch.zeros(2), torch.zeros(3)], "tag"),
        ([float("nan"), float("nan") * 2], None),
        ([float("nan"), 1.0], r"tag \(nan, 1.0\)"),
        ([torch.tensor(0.5), 0.5], None),
        ([torch.tensor(0.1), 0.1], r"tag \(0.10000000149011612, 0.1\)"),
        ([[1, (2.0,)], [1, (2.0,)]], None),
        ([Incomparable(), Incomparable()], "tag"),
    ],
    ids=str,
)
def test_whatever_users_have_in_groups_is_compared(entries, words):
    parts = [list(nn.Linear(2, 2).named_parameters(name)) for name in "ab"]
    groups = [{"params": p, "tag": entry} for p, entry in zip(parts, entries, strict=True)]
    saved = stepwell.AdamW(groups).state_dict()
    target = stepwell.AdamW([*parts[0], *parts[1]])
    if words is None:
        assert target.load_state_dict(saved, strict=True).is_empty
    else:
        with pytest.raises(ValueError, match=f"differ in {words}"):
            target.load_state_dict(saved, strict=True)


def test_what_lies_in_one_group_is_not_turned_into_numbers(monkeypatch):
    model = list(nn.Linear(2, 2).named_parameters())
    saved = stepwell.AdamW([{"params": model, "table": torch.rand(300, 300)}]).state_dict()
    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    stepwell.AdamW(model).load_state_dict(saved)


def test_groups_that_were_one_share_no_tensors(path):
    model = list(nn.Linear(2, 2).named_parameters())
    rates = {"lr": torch.tensor(0.5), "table": [torch.zeros(2)]}
    optimizer = stepwell.AdamW([{"params": model, **rates}])
    save(path, optimizer=optimizer)
    split = [stepwell.AdamW([{"params": [p]} for p in model]) for _ in range(2)]
    load(path, optimizer=split[0])
    split[1].load_state_dict(optimizer.state_dict())
    for one, other in (target.param_groups for target in split):
        one["lr"].fill_(0.25)
        one["table"][0].fill_(7.0)
        assert other["lr"].item() == 0.5
        assert other["table"][0].tolist() == [0.0, 0.0]
    assert optimizer.param_groups[0]["lr"].item() == 0.5


# Large state in lists, and reports


def test_large_tensors_in_lists_are_read(path):
    models = nn.Linear(300, 300), nn.Linear(300, 300)
    optimizers = [stepwell.LBFGS(m.named_parameters(), max_iter=4) for m in models]

    def closure():
        optimizers[0].zero_grad()
        loss = models[0](torch.ones(2, 300)).square().sum()
        loss.backward()
        return loss

    optimizers[0].step(closure)
    save(path, model=models[0], optimizer=optimizers[0])
    load(path, model=models[1], optimizer=optimizers[1])
    assert_same_training(snapshot(optimizers[1]), snapshot(optimizers[0]), "as loaded")


def test_a_report_has_all_that_does_not_fit(path):
    save(path, model=nn.Sequential(*(nn.Linear(1, 1) for _ in range(60))))
    with pytest.raises(CheckpointError) as caught:
        load(path, model=nn.Sequential(*(nn.Linear(2, 2) for _ in range(60))))
    assert len(caught.value.report.mismatched) == 120
    assert str(caught.value).count("has shape") == 100
    assert "... and 20 more" in str(caught.value)


# Layouts


class Copied(TorchDispatchMode):
    """Counts the elements that operations make or write."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += made.numel()
        return made


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((3, 5, 7), (2, 0, 1)),
        ((1, 60, 90), (0, 2, 1)),
        ((4, 1, 5), (2, 1, 0)),
        ((2, 3, 4, 5), (3, 1, 0, 2)),
        ((40,), (0,)),
    ],
    ids=str,
)
def test_a_piece_of_any_layout_takes_no_more_than_itself(shape, order):
    def make(fill):
        tensor = torch.zeros(*shape, 2)[..., 0].permute(order)
        return tensor.copy_(fill.view(tensor.shape))

    numbers = torch.arange(float(torch.Size(shape).numel()))
    tensor, rng = make(numbers), random.Random(0)
    for _ in range(50):
        first, last = sorted(rng.sample(range(len(numbers) + 1), 2))
        place, values = (4 * first, 4 * last), numbers[first:last]
        target = make(torch.zeros_like(numbers))
        with Copied() as copied:
            piece = get_piece(tensor, *place)
            set_piece(target, *place, values)
        assert bytes(piece) == values.numpy().tobytes()
        expected = torch.zeros_like(numbers)
        expected[first:last] = values
        assert torch.equal(target.reshape(-1), expected)
        # new memory, and a copy to each side
        assert copied.count <= 3 * len(values)
