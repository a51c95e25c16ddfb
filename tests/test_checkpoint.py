"""Does a checkpoint carry a training over, to the bit, and is what does not fit refused?"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import xxhash
from torch import nn

import stepwell
from stepwell.checkpoint import CheckpointError, load, save
from stepwell.lr_scheduler import (
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from .cases import PLAIN, numbers
from .compare import assert_same_bits, assert_same_training, snapshot


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(model, optimizer, steps=2, scheduler=None):
    for step in range(steps):
        optimizer.zero_grad()
        model(numbers((5, 3), torch.float32, step)).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def everything(model, optimizer):
    """Copies of all that a load may change."""
    state = {f"model {k}": v.clone() for k, v in model.state_dict().items()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return state, snapshot(optimizer), repr(groups)


def assert_same(found, expected):
    assert found[2] == expected[2]
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name
    assert_same_training(found[1], expected[1], "the optimizer")


# What is carried over


@pytest.mark.tiny
def test_a_whole_training_goes_on_to_the_bit(path):
    models = small_model(), small_model(1)
    optimizers = [stepwell.AdamW(m.parameters(), lr=0.1) for m in models]
    schedulers = [StepLR(o, 2, gamma=0.5) for o in optimizers]
    train(models[0], optimizers[0], 3, schedulers[0])
    save(path, model=models[0], optimizer=optimizers[0], scheduler=schedulers[0], extra={"n": 3})
    loaded = load(path, model=models[1], optimizer=optimizers[1], scheduler=schedulers[1])
    assert loaded.extra == {"n": 3}
    assert loaded.report.is_empty
    assert "param_names" not in optimizers[1].param_groups[0]
    for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
        train(model, optimizer, 4, scheduler)
    assert_same(everything(models[1], optimizers[1]), everything(models[0], optimizers[0]))
    assert schedulers[1].state_dict() == schedulers[0].state_dict()


ADAMW = next(case for case in PLAIN if case.rule is stepwell.AdamW)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in PLAIN),
        (ADAMW, torch.bfloat16),
        (ADAMW, torch.complex64),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_each_rule(path, case, dtype):
    shapes = ((3, 4), (0,), (), (40, 900))

    def make(seed):
        params = [nn.Parameter(numbers(s, dtype, seed + i)) for i, s in enumerate(shapes)]
        # some lie in another order of memory
        params[0] = nn.Parameter(params[0].detach().t().contiguous().t())
        return params, case.make([(f"p{i}", param) for i, param in enumerate(params)])

    def step(params, optimizer, number):
        for i, param in enumerate(params):
            param.grad = numbers(param.shape, dtype, 100 * number + i)
        optimizer.step()

    (params, optimizer), (others, resumed) = make(0), make(50)
    step(params, optimizer, 1)
    save(path, optimizer=optimizer)
    load(path, optimizer=resumed)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    assert_same_training(resumed, optimizer, "as loaded")
    for each in ((params, optimizer), (others, resumed)):
        step(*each, 2)
    assert_same_training(resumed, optimizer, "one step later")


def test_hyperparameters_keep_their_types(path):
    weight = nn.Parameter(torch.ones(2))
    optimizer = stepwell.AdamW(
        [("w", weight)], lr=torch.tensor(0.1), betas=(0.25, 1 / 3), weight_decay=1e-300
    )
    optimizer.param_groups[0].update(note=(1, None, "x"), endless=float("inf"))
    save(path, optimizer=optimizer)
    other = stepwell.AdamW([("w", weight)])
    load(path, optimizer=other)
    found = other.param_groups[0]
    assert found["betas"] == (0.25, 1 / 3)
    assert type(found["betas"]) is tuple
    assert torch.equal(found["lr"], torch.tensor(0.1))
    assert (found["weight_decay"], found["note"]) == (1e-300, (1, None, "x"))
    assert found["endless"] == float("inf")


@pytest.mark.parametrize(
    "value",
    [
        {1: (2, [3.5, {"a": None}])},
        {"nan": float("nan"), "-0": -0.0},
        torch.bfloat16,
        [torch.tensor(True), torch.arange(3), torch.tensor(0.1, dtype=torch.float64)],
        [torch.tensor(float("nan")), torch.tensor([1.5 - 2.0j, 0.25j])],
    ],
    ids=str,
)
def test_extra(path, value):
    save(path, extra=value)
    assert str(load(path).extra) == str(value)


def test_numbers_of_numpy_become_pythons(path):
    save(path, extra=[np.float32(0.1), np.int64(4)])
    assert str(load(path).extra) == str([float(np.float32(0.1)), 4])


@pytest.mark.parametrize("value", [{1, 2}, object(), len, [b"bytes"]])
def test_what_only_code_could_load_is_refused(path, value):
    with pytest.raises(TypeError, match=r"extra.* has type .*, which a checkpoint cannot hold"):
        save(path, extra=value)
    assert not path.exists()


def test_schedulers(path):
    weight = nn.Parameter(torch.ones(2))
    for make in (
        lambda o: MultiStepLR(o, [1, 1, 3]),
        lambda o: LambdaLR(o, lambda step: 0.5**step),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 2]),
    ):
        pairs = []
        for _ in range(2):
            optimizer = stepwell.SGD([("w", weight)], lr=1.0)
            pairs.append((optimizer, make(optimizer)))
        (optimizer, scheduler), (fresh, resumed) = pairs
        weight.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
        save(path, optimizer=optimizer, scheduler=scheduler)
        load(path, optimizer=fresh, scheduler=resumed)
        fresh.step()
        for _ in range(3):
            scheduler.step()
            resumed.step()
            assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_random_numbers_go_on(path):
    save(path, with_random_state=True)
    expected = random.random(), np.random.random(), torch.rand(3)
    load(path, with_random_state=True)
    found = random.random(), np.random.random(), torch.rand(3)
    assert found[:2] == expected[:2]
    assert torch.equal(found[2], expected[2])
    save(path, extra=1)
    with pytest.raises(CheckpointError, match="has no states of random number generators"):
        load(path, with_random_state=True)


def test_averaged_model_and_tied_weights(path):
    model = nn.Module()
    model.one, model.other = nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False)
    model.other.weight = model.one.weight
    averaged = stepwell.swa_utils.AveragedModel(model)
    save(path, model=model, averaged=averaged, optimizer=stepwell.SGD(model.parameters()))
    with safetensors.safe_open(path, "pt") as file:
        # tied weights are stored once
        assert sorted(file.keys()) == ["averaged.module.one.weight", "model.one.weight"]
    expected = model.one.weight.detach().clone()
    version = model.one.weight._version
    with torch.no_grad():
        for param in (model.one.weight, averaged.module.one.weight):
            param.zero_()
    load(path, model=model, averaged=averaged)
    assert_same_bits(model.one.weight, expected, "the weight")
    assert_same_bits(averaged.module.other.weight, expected, "the average")
    assert model.one.weight._version > version + 1, "autograd must know of the change"


def test_wrappers_change_no_names(path):
    model = small_model()
    wrapped = nn.DataParallel(model)
    optimizer = stepwell.AdamW(model.parameters())
    train(model, optimizer)
    save(path, model=wrapped, optimizer=optimizer)
    other = small_model(1)
    resumed = stepwell.AdamW(other.parameters())
    load(path, model=other, optimizer=resumed)
    assert_same(everything(other, resumed), everything(model, optimizer))
    load(path, model=wrapped, optimizer=optimizer)


def test_a_module_with_state_of_its_own(path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.ones(3)), 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    one, other = Counting(), Counting()
    one.seen = 7
    save(path, model=one)
    load(path, model=other)
    assert other.seen == 7


# The file


@pytest.mark.tiny
def test_safetensors_reads_the_tensors(path):
    model = small_model()
    optimizer = stepwell.AdamW(model.parameters())
    train(model, optimizer)
    save(path, model=model, optimizer=optimizer)
    tensors = safetensors.torch.load_file(path)
    for name, param in model.named_parameters():
        assert_same_bits(tensors[f"model.{name}"], param, name)
        for slot in ("exp_avg", "exp_avg_sq"):
            found = tensors[f"optimizer.{name}.{slot}"]
            assert_same_bits(found, optimizer.state[param][slot], f"{name} {slot}")
    with safetensors.safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["stepwell"])
    assert described["optimizer"]["rule"] == "AdamW"
    assert described["optimizer"]["params"]["0.weight"] == [[4, 3], "float32"]
    assert described["torch"] == torch.__version__
    assert described["stepwell"] == stepwell.__version__


def test_digests_and_places_are_as_documented(path):
    save(path, extra=[torch.randn(3), torch.randn(16, 50_000), torch.randn(64).double()])
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:first])
    metadata = header.pop("__metadata__")
    blank = content[:first].replace(metadata["xxh3_128"].encode(), b"0" * 32)
    assert xxhash.xxh3_128_hexdigest(blank) == metadata["xxh3_128"]
    digests = json.loads(metadata["stepwell"])["digests"]
    assert sorted(digests) == sorted(header) == ["extra.0", "extra.1", "extra.2"]
    for name, entry in header.items():
        start, stop = (first + offset for offset in entry["data_offsets"])
        pieces = [content[i : min(i + 2**20, stop)] for i in range(start, stop, 2**20)]
        whole = b"".join(xxhash.xxh3_128_digest(piece) for piece in pieces)
        assert xxhash.xxh3_128_hexdigest(whole) == digests[name]
        assert start % 64 == 0 or (stop - start) % 64, f"{name} is not aligned"


def test_layouts_and_dtypes_are_written_in_order(path):
    extra = {
        "transposed": torch.randn(70, 90).t(),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "gaps": torch.randn(50, 60)[::2, 1::3],
        "broadcast": torch.randn(1, 4).expand(3, 4),
        "half": torch.randn(5).half(),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "truth": torch.tensor([True, False]),
        "words": torch.tensor([1, 65535], dtype=torch.uint16),
        "conjugate": torch.randn(4, dtype=torch.complex128).conj(),
    }
    save(path, extra=extra)
    found = load(path).extra
    stored = safetensors.torch.load_file(path)
    for name, expected in extra.items():
        assert found[name].dtype == expected.dtype
        # torch compares no numbers of eight bits
        wide = torch.float16 if name == "eight" else expected.dtype
        assert torch.equal(found[name].to(wide), expected.to(wide)), name
        if not expected.is_complex():
            assert str(stored[f"extra.{name}"]) == str(expected.contiguous()), name


def test_tensors_of_many_pieces(path, monkeypatch):
    from stepwell.checkpoint import pieces

    monkeypatch.setattr(pieces, "PIECE", 64)
    extra = [torch.randn(33, 7), torch.randn(7, 33).t(), torch.randn(3, 5, 7).permute(2, 0, 1)]
    save(path, extra=extra)
    for found, expected in zip(load(path).extra, extra, strict=True):
        assert torch.equal(found, expected)
    model = nn.Linear(33, 7)
    model.weight.data = extra[0].clone().t()
    save(path, model=model)
    other = nn.Linear(33, 7)
    monkeypatch.setattr("stepwell.checkpoint.states.SMALL", 0)
    other.weight.data = torch.empty(33, 7).t()
    load(path, model=other)
    assert torch.equal(other.weight, model.weight)


# Matching


@pytest.mark.tiny
def test_parameters_and_groups_may_change_places(path):
    model = small_model()
    params = dict(model.named_parameters())
    matrices = [(name, param) for name, param in params.items() if param.dim() == 2]
    others = [(name, param) for name, param in params.items() if param.dim() < 2]
    optimizer = stepwell.AdamW([{"params": matrices, "lr": 0.5}, {"params": others, "lr": 0.25}])
    train(model, optimizer)
    save(path, optimizer=optimizer)
    other = stepwell.AdamW([{"params": others[::-1]}, {"params": matrices[::-1]}])
    load(path, optimizer=other)
    assert [g["lr"] for g in other.param_groups] == [0.25, 0.5]
    for param in params.values():
        for slot, value in optimizer.state[param].items():
            assert_same_bits(other.state[param][slot], value, slot)


SCHEDULES = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
    "CyclicLR": lambda optimizer: CyclicLR(optimizer, 0.01, 1.0, step_size_up=3),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, total_iters=2), ExponentialLR(optimizer, 0.5)], [2]
    ),
    "torch's": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
}


@pytest.mark.parametrize("split", ["c|ab", "b|c|a", "a|cb"])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_follow_groups_that_were_rearranged(path, split, make):
    """Each parameter goes on at the rates that it would have had."""
    params = {name: nn.Parameter(torch.ones(2)) for name in "abc"}
    rates = {"a": 0.5, "b": 0.5 if "cb" not in split else 0.25, "c": 0.25}

    def made(split):
        groups = [
            {"params": [(n, params[n]) for n in names], "lr": rates[names[0]]}
            for names in split.split("|")
        ]
        optimizer = stepwell.SGD(groups, momentum=0.5)
        return optimizer, make(optimizer)

    def rates_of(optimizer):
        return {
            name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]
        }

    def go_on(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            is_plateau = "ReduceLROnPlateau" in type(scheduler).__name__
            scheduler.step(*[1.0] * is_plateau)

    for param in params.values():
        param.grad = torch.ones(2)
    optimizer, scheduler = made("a|bc" if "cb" in split else "ab|c")
    go_on(optimizer, scheduler, 1)
    save(path, optimizer=optimizer, scheduler=scheduler)
    other, resumed = made(split)
    load(path, optimizer=other, scheduler=resumed)
    assert resumed.get_last_lr() == [group["lr"] for group in other.param_groups]
    for _ in range(4):
        assert rates_of(other) == rates_of(optimizer)
        go_on(optimizer, scheduler, 1)
        go_on(other, resumed, 1)
    assert rates_of(other) == rates_of(optimizer)


def test_groups_may_be_split_and_put_together(path):
    model = small_model()
    optimizer = stepwell.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    train(model, optimizer)
    save(path, model=model, optimizer=optimizer)
    other = small_model(1)
    target = stepwell.AdamW(stepwell.groups.no_decay(other))
    assert load(path, model=other, optimizer=target).report.is_empty
    assert [g["name"] for g in target.param_groups] == ["decay", "no decay"]
    assert [(g["lr"], g["weight_decay"]) for g in target.param_groups] == [(0.5, 0.25)] * 2
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(target.state[two]["exp_avg"], optimizer.state[one]["exp_avg"], "exp_avg")
    # back again: what is put together is one, for nothing in it differs but the names of groups
    for group in target.param_groups:
        del group["name"]
    save(path, model=other, optimizer=target)
    load(path, model=model, optimizer=optimizer)
    # and now something does
    target.param_groups[1]["weight_decay"] = 0.0
    save(path, model=other, optimizer=target)
    before = everything(model, optimizer)
    with pytest.raises(
        CheckpointError,
        match=r"group 0: its parameters were in groups 0, 1 .*differ in weight_decay \(0.25, 0.0\)",
    ):
        load(path, model=model, optimizer=optimizer)
    assert_same(everything(model, optimizer), before)


def test_a_report_lists_everything_and_changes_nothing(path):
    model = small_model()
    optimizer = stepwell.AdamW(model.named_parameters())
    train(model, optimizer)
    save(path, model=model, optimizer=optimizer)
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    other[2].half()
    params = [(n.replace("1.", "norm."), p) for n, p in other.named_parameters()]
    target = stepwell.Adam(params)
    scheduler = StepLR(target, 1)
    for param in other.parameters():
        param.grad = torch.ones_like(param)
    target.step()
    before = everything(other, target)
    with pytest.raises(CheckpointError) as caught:
        load(path, model=other, optimizer=target, scheduler=scheduler)
    said = str(caught.value)
    for part in (
        str(path),
        "missing: scheduler: not in the file",
        "missing: model: 3.weight",
        "model: 0.weight has shape (4, 3), must have (5, 3)",
        "model: 2.weight is torch.float32, must be torch.float16",
        "the rule: the file has state of AdamW, not Adam",
        "missing: norm.weight (the state dict has 1.weight)",
        "nothing was loaded; strict=False loads what fits",
        "each tensor is listed once, the error's report has all",
    ):
        assert part in said
    for part in (
        "0.weight: has shape [4, 3] in the file, [5, 3] in the optimizer",
        "2.bias: is float32 in the file, float16 in the optimizer",
    ):
        assert any(entry.startswith(part) for entry in caught.value.report.mismatched)
    assert_same(everything(other, target), before)


def test_a_tensor_that_does_not_fit_is_named_once(path):
    model = small_model()
    optimizer = stepwell.AdamW(model.parameters())
    train(model, optimizer)
    save(path, model=model, optimizer=optimizer)
    inside = nn.ModuleDict({"body": small_model()})
    for other, kind in ((inside, "missing"), (nn.Sequential(nn.Linear(3, 9)), "mismatched")):
        target = stepwell.AdamW(other.parameters())
        with pytest.raises(CheckpointError) as caught:
            load(path, model=other, optimizer=target)
        lines = str(caught.value).splitlines()[1:-1]
        name = next(name for name, _ in other.named_parameters())
        assert len([line for line in lines if f"{name} " in line]) == 1, lines
        # of the optimizer too
        assert len([entry for entry in getattr(caught.value.report, kind) if name in entry]) > 1
        # a name that was probably meant is not a second line
        assert not any("unexpected: model: 0.weight" in line for line in lines)
    with pytest.raises(CheckpointError, match=r"missing: body\.0\.weight") as caught:
        load(path, optimizer=stepwell.AdamW(inside.named_parameters()))
    for index in (0, 1):
        assert f"group {index}" not in str(caught.value)


def test_parts_without_their_names_are_refused(path):
    model = small_model()
    optimizer = stepwell.AdamW(model.parameters())
    scheduler = StepLR(optimizer, 1)
    for what, function in (("save", save), ("load", load)):
        for given, said in (
            ((model,), "model=model"),
            ((optimizer, model), "optimizer=optimizer, model=model"),
            ((scheduler, {"epoch": 1}, {}), "scheduler=scheduler, extra=extra"),
        ):
            with pytest.raises(TypeError) as caught:
                function(path, *given)
            assert str(caught.value) == f"{what}: say what each part is: {what}(path, {said})"


def test_partial_loads_and_renames(path):
    model = small_model()
    optimizer = stepwell.AdamW(model.parameters())
    train(model, optimizer)
    save(path, model=model, optimizer=optimizer)
    wrapped = nn.ModuleDict({"body": small_model(1), "head": nn.Linear(2, 7)})
    target = stepwell.AdamW(wrapped.parameters())
    loaded = load(
        path, model=wrapped, optimizer=target, strict=False, rename={r"^(\d)\.": r"body.\1."}
    )
    assert set(loaded.report.missing) >= {"model: head.weight", "model: head.bias"}
    assert not loaded.report.unexpected
    assert not loaded.report.mismatched
    for ours, theirs in zip(wrapped["body"].parameters(), model.parameters(), strict=True):
        assert_same_bits(ours, theirs, "a parameter")
        assert_same_bits(
            target.state[ours]["exp_avg"], optimizer.state[theirs]["exp_avg"], "its state"
        )
    assert wrapped["head"].weight not in target.state
    with pytest.raises(CheckpointError, match="which rename makes a second 'x'"):
        load(path, model=wrapped, rename={"^.*$": "x"})


@pytest.mark.parametrize("size", [4, 300])
def test_dtypes_are_as_asked(path, size):
    param = nn.Parameter(torch.randn(size, size))
    param.grad = torch.randn(size, size)
    optimizer = stepwell.AdamW([("w", param)])
    optimizer.step()
    save(path, optimizer=optimizer)
    half = nn.Parameter(param.detach().bfloat16())
    for dtype, expected in (("param", torch.bfloat16), (torch.float32, torch.float32)):
        other = stepwell.AdamW([("w", half)])
        load(path, optimizer=other, dtype=dtype)
        found = other.state[half]["exp_avg"]
        assert found.dtype == expected
        assert_same_bits(found, optimizer.state[param]["exp_avg"].to(expected), str(dtype))


def test_parameters_without_a_name_are_refused(path):
    optimizer = stepwell.SGD([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match="group 0, parameter 0 has no name"):
        save(path, optimizer=optimizer)
    assert not path.exists()


def test_hyperparameters_out_of_range_are_refused(path):
    model = small_model()
    optimizer = stepwell.SGD(model.parameters(), lr=0.1)
    dict.__setitem__(optimizer.param_groups[0], "lr", -1.0)
    save(path, model=model, optimizer=optimizer)
    other = stepwell.SGD(model.parameters(), lr=0.5)
    before = everything(model, other)
    with pytest.raises(CheckpointError, match="Invalid learning rate: -1"):
        load(path, model=model, optimizer=other)
    assert_same(everything(model, other), before)


def test_a_scheduler_that_refuses_leaves_all_as_it_was(path):
    model = small_model()
    optimizer = stepwell.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 2)
    scheduler.step_size = -1
    save(path, model=model, optimizer=optimizer, scheduler=scheduler)
    other = small_model(1)
    target = stepwell.SGD(other.parameters(), lr=0.5)
    before = everything(other, target)
    with pytest.raises(CheckpointError, match="scheduler: ValueError"):
        load(path, model=other, optimizer=target, scheduler=StepLR(target, 2))
    assert target.param_groups[0]["lr"] == 0.5
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[0][f"model {name}"])
