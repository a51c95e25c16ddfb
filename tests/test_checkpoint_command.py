"""Does `python -m stepwell checkpoint` say what is so, and does torch read what it converts?"""

from __future__ import annotations

import io
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import stepwell
from stepwell.__main__ import main
from stepwell.checkpoint import (
    CheckpointError,
    convert,
    from_torch,
    load,
    save,
    to_torch,
    verify,
)
from stepwell.state_dict import EXECUTION

from .cases import PLAIN, Case, named, numbers
from .compare import assert_same_bits, assert_within
from .shell_cases import assert_same


def layers(**options):
    return nn.Sequential(nn.Linear(3, 4, **options), nn.Linear(4, 2, **options))


def trained(make, steps=3, model=layers):
    """A model, and an optimizer after some steps."""
    torch.manual_seed(0)
    model = model()
    optimizer = make(model.named_parameters())
    go_on(model, optimizer, range(steps))
    return model, optimizer


def go_on(model, optimizer, steps=range(3, 6)):
    for step in steps:
        inputs = numbers((5, 3), torch.float32, step)
        if isinstance(model, nn.Embedding):
            inputs = inputs.square().int() % model.num_embeddings

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def said(capsys, *arguments):
    status = main(["checkpoint", *map(str, arguments)])
    found = capsys.readouterr()
    return status, found.out, found.err


@pytest.mark.tiny
def test_show(path, capsys):
    model, optimizer = trained(stepwell.AdamW)
    save(path, model=model, optimizer=optimizer, extra={"note": 1})
    status, out, _ = said(capsys, "show", path)
    assert status == 0
    assert "AdamW, model, extra; 12 tensors" in out
    assert "lr=0.001, betas=(0.9, 0.999)" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    norm = f"{float(model[0].weight.detach().double().norm()):.4g}"
    assert rows["model.0.weight"] == ["model.0.weight", "(4,", "3)", "float32", norm, "48"]
    moment = optimizer.state[model[1].bias]["exp_avg"]
    assert rows["optimizer.1.bias.exp_avg"][1:] == [
        "(2,)", "float32", f"{float(moment.double().norm()):.4g}", "8",
    ]  # fmt: skip
    assert rows["1.bias"] == ["1.bias", "0", "(2,)", "float32", "3"]


def test_show_says_where_the_schedule_stands_and_what_is_extra(path, capsys):
    _, optimizer = trained(stepwell.SGD)
    schedules = stepwell.lr_scheduler
    parts = [schedules.ConstantLR(optimizer, 0.5, 9), schedules.StepLR(optimizer, 2)]
    scheduler = schedules.SequentialLR(optimizer, parts, [4])
    optimizer.step()
    scheduler.step()
    extra = {
        "epoch": 3,
        "losses": [0.5, 0.25],
        "options": {"name": "a run", "sizes": {"hidden": (4, 2)}},
        "loss": torch.tensor(0.5),
        "mask": torch.ones(2, 3),
        "log": "x" * 1000,
        "many": {i: i for i in range(100)},
    }
    save(path, optimizer=optimizer, scheduler=scheduler, extra=extra)
    _, out, _ = said(capsys, "show", path)
    found = [" ".join(line.split()) for line in out.splitlines()]
    for row in (
        "scheduler SequentialLR(ConstantLR, StepLR)",
        "scheduler: step 1",
        "scheduler: rates [0.0005]",
        "extra.epoch 3",
        "extra.losses [0.5, 0.25]",
        "extra.options.name a run",
        "extra.options.sizes.hidden (4, 2)",
        "extra.loss 0.5",
        "extra.mask float32 (2, 3)",
        f"extra.log {'x' * 200}...",
        "... 60 more",
    ):
        assert row in found, row


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("command", ["show", "diff", "verify", "table"])
def test_any_terminal_is_printed_to(path, monkeypatch, encoding, command):
    model, optimizer = trained(stepwell.AdamW, 1)
    model.append(nn.Linear(2, 2))
    model.append(nn.Linear(2, 2))
    other = path.with_name("other.safetensors")
    save(path, model=model, optimizer=optimizer, extra={"Größe": "·─"})
    save(other, model=model, extra={"Größe": "×"})
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    if command == "table":
        print(stepwell.groups.table(model))
    else:
        main(["checkpoint", command, str(path), *([str(other)] if command == "diff" else [])])
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    words = {"show": "0.weight", "diff": "extra.", "verify": "is what was written", "table": "2 "}
    assert words[command] in text
    # what is no letter has a counterpart of the same width
    assert "\N{REPLACEMENT CHARACTER}" not in text
    if command == "table":
        assert ("2 × 4" if encoding == "utf-8" else "2 x 4") in text
        assert ("────" if encoding == "utf-8" else "----") in text


def test_show_does_nothing_to_a_terminal(path, capsys):
    save(path, model=None, extra={"\x1b[2Jwiped [bold]": torch.ones(2)})
    _, out, _ = said(capsys, "show", path)
    assert "\x1b" not in out
    assert "�[2Jwiped [bold]" in out


@pytest.mark.tiny
def test_diff(path, capsys):
    other = path.with_name("other.safetensors")
    model, optimizer = trained(stepwell.AdamW)
    save(path, model=model, optimizer=optimizer)
    save(other, model=model, optimizer=optimizer)
    assert said(capsys, "diff", path, other) == (0, "no difference\n", "")
    with torch.no_grad():
        model[0].bias[1] += 0.5
    optimizer.param_groups[0]["lr"] = 0.25
    del optimizer.state[model[1].weight]["exp_avg"]
    save(other, model=model, optimizer=optimizer)
    status, out, _ = said(capsys, "diff", path, other)
    assert status == 1
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert rows["model.0.bias"].split()[1:] == ["values", "0.5", "1", "of", "4"]
    assert "0.001 -> 0.25" in rows["optimizer.groups.0.lr"]
    assert "only in the first" in rows["optimizer.1.weight.exp_avg"]
    assert "0.weight" not in out


@pytest.mark.tiny
def test_verify(path, capsys):
    save(path, extra=torch.ones(3))
    assert said(capsys, "verify", path)[:2] == (0, f"{path} is what was written\n")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    status, out, err = said(capsys, "verify", path)
    assert (status, out) == (1, "")
    assert f"{path} is damaged: the bytes of 'extra' are not what was written" in err
    assert said(capsys, "show", path)[0] == 1
    assert said(capsys, "verify", path.with_name("nothing"))[0] == 1


# To and from torch


TENSORS = {"lr": torch.tensor(0.02), "betas": (torch.tensor(0.8), torch.tensor(0.95))}


class Twin(NamedTuple):
    """A class of torch and ours, and what they train.

    Attributes:
        limit: how far parameters may be apart after three more steps. In ULP, as in test_twins.py;
            Muon's matrices, whose products are of bfloat16, by a share of the way (test_muon.py)
    """

    case: Case
    model: Any = layers
    more: Mapping[str, Any] = {}
    limit: float = 64

    def make(self, params):
        return self.case.make(params, **self.more)

    @property
    def name(self):
        return self.case.name


TWINS = (
    *map(Twin, PLAIN),
    Twin(Case("Adam(tensors)", stepwell.Adam, torch.optim.Adam, TENSORS)),
    Twin(
        Case("Muon()", stepwell.Muon, torch.optim.Muon, {"lr": 0.05}),
        lambda: layers(bias=False),
        {"ns_dtype": "bfloat16"},
        0.02,
    ),
    *(
        Twin(Case(f"LBFGS({search})", stepwell.LBFGS, torch.optim.LBFGS, options))
        for search in (None, "strong_wolfe")
        for options in [{"lr": 0.1, "max_iter": 3, "history_size": 4, "line_search_fn": search}]
    ),
    Twin(
        Case("SparseAdam()", stepwell.SparseAdam, torch.optim.SparseAdam, {"lr": 0.05}),
        lambda: nn.Embedding(9, 4, sparse=True),
    ),
)
each_twin = pytest.mark.parametrize("twin", **named(TWINS))


def test_every_class_of_torch_is_among_them():
    classes = {value for value in vars(torch.optim).values() if isinstance(value, type)}
    assert {twin.case.twin for twin in TWINS} == classes - {torch.optim.Optimizer}


SCRATCH = {"al", "inverse", "oldest", "resting"}
"""What LBFGS has beside its history: coefficients in torch, products and who is frozen in ours."""


def state_of(optimizer):
    """The state as it is saved; a momentum that torch lists as None is none."""
    return {
        key: {n: plain(v) for n, v in entry.items() if v is not None and n not in SCRATCH}
        for key, entry in optimizer.state_dict()["state"].items()
    }


def plain(value):
    """A number that one library keeps in a tensor, and the other not, as a number."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


def assert_goes_on(twin, taken, left):
    """Two models and their optimizers: the same state, to the bit, and then the same steps."""
    assert_same(state_of(taken[1]), state_of(left[1]))
    (own,), (other,) = taken[1].param_groups, left[1].param_groups
    for name in own.keys() & other.keys() - {"params", *EXECUTION}:
        assert_same(own[name], other[name], name)
    before = [param.detach().clone() for param in left[0].parameters()]
    go_on(*taken)
    go_on(*left)
    moved = zip(taken[0].parameters(), left[0].parameters(), before, strict=True)
    for index, (one, other, start) in enumerate(moved):
        assert not torch.equal(other, start)
        if twin.limit < 1:
            assert (one - other).norm() <= twin.limit * (other - start).norm()
        else:
            assert_within(one.detach(), other.detach(), twin.limit, f"parameter {index}")


@each_twin
def test_torch_goes_on_from_a_converted_file(path, twin):
    model, optimizer = trained(twin.make, model=twin.model)
    save(path, model=model, optimizer=optimizer)
    target = path.with_name("run.pt")
    assert convert(path, target) == "a file of torch.save with model, optimizer"
    content = torch.load(target, weights_only=True)
    assert str(to_torch(path)["optimizer"]) == str(content["optimizer"])
    again, _ = trained(twin.make, 0, twin.model)
    again.load_state_dict(content["model"])
    theirs = twin.case.make_twin(again.named_parameters())
    theirs.load_state_dict(content["optimizer"])
    assert_goes_on(twin, (again, theirs), (model, optimizer))


@each_twin
@pytest.mark.parametrize("layout", ["whole", "optimizer alone"])
def test_a_file_of_torch_becomes_a_checkpoint(path, capsys, monkeypatch, twin, layout):
    model, theirs = trained(twin.case.make_twin, model=twin.model)
    source, names = path.with_name("run.pt"), path.with_name("names.txt")
    state_dict = theirs.state_dict()
    for group in state_dict["param_groups"]:
        # most people's have none
        group.pop("param_names")
        group["initial_lr"] = 0.5
    whole = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": state_dict,
        "epoch": 7,
    }
    torch.save(whole if layout == "whole" else state_dict, source)
    names.write_text("\n".join(name for name, _ in model.named_parameters()) + "\n")
    parts = "model, optimizer; epoch: kept as extra" if layout == "whole" else "optimizer"
    assert said(capsys, "convert", source, path, "--names", names) == (
        0,
        f"{path} is written, a checkpoint with {parts}\n",
        "",
    )
    again, ours = trained(twin.make, 0, twin.model)
    if layout == "whole":
        assert load(path, model=again, optimizer=ours).extra == {"epoch": 7}
        for one, other in zip(again.parameters(), model.parameters(), strict=True):
            assert_same_bits(one, other, "a parameter")
    else:
        # as if all tensors were large
        monkeypatch.setattr("stepwell.checkpoint.states.SMALL", 0)
        load(path, optimizer=ours)
        again.load_state_dict(model.state_dict())
    assert ours.param_groups[0]["initial_lr"] == 0.5
    assert_goes_on(twin, (again, ours), (model, theirs))


def test_how_a_step_is_run_stays_as_constructed(path):
    _, theirs = trained(lambda params: torch.optim.AdamW(params, foreach=True))
    torch.save(theirs.state_dict(), path.with_name("run.pt"))
    convert(path.with_name("run.pt"), path)
    _, ours = trained(lambda params: stepwell.AdamW(params, fused=True), 0)
    load(path, optimizer=ours)
    assert (ours.param_groups[0]["foreach"], ours.param_groups[0]["fused"]) == (None, True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StepLR", {"step_size": 2}),
        ("CosineAnnealingLR", {"T_max": 9}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 20}),
        ("ReduceLROnPlateau", {"patience": 1}),
    ],
)
def test_schedules_go_on(path, name, options):
    """From torch's file to ours, and from ours to torch's; rates differ by roundings of floats."""

    def made(library):
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        optimizer = library.SGD([("weight", weight)], lr=0.5, momentum=0.9)
        return optimizer, getattr(library.lr_scheduler, name)(optimizer, **options)

    def rates(optimizer, scheduler):
        found = []
        for _ in range(4):
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    source, target = path.with_name("theirs.pt"), path.with_name("ours.pt")
    theirs, ours, last = made(torch.optim), made(stepwell), made(torch.optim)
    rates(*theirs)
    optimizer, scheduler = (part.state_dict() for part in theirs)
    torch.save({"optimizer": optimizer, "scheduler": scheduler}, source)
    convert(source, path)
    load(path, optimizer=ours[0], scheduler=ours[1])
    save(path, optimizer=ours[0], scheduler=ours[1])
    convert(path, target)
    content = torch.load(target, weights_only=True)
    last[0].load_state_dict(content["optimizer"])
    last[1].load_state_dict(content["scheduler"])
    expected = rates(*theirs)
    assert rates(*ours) == pytest.approx(expected, rel=1e-12)
    assert rates(*last) == pytest.approx(expected, rel=1e-12)


def test_names_are_asked_for(path, capsys):
    _, theirs = trained(lambda params: torch.optim.AdamW([p for _, p in params]))
    source = path.with_name("run.pt")
    torch.save(theirs.state_dict(), source)
    status, _, err = said(capsys, "convert", source, path)
    assert status == 1
    assert "does not name its parameters" in err
    names = path.with_name("names.txt")
    names.write_text("a\nb\n")
    _, _, err = said(capsys, "convert", source, path, "--names", names)
    assert "has 4 parameters, and 2 names are given" in err
    names.write_bytes(b"\xff")
    _, _, err = said(capsys, "convert", source, path, "--names", names)
    assert f"{names} is no list of names" in err
    assert not path.exists()


@pytest.mark.parametrize("extra", [{"epoch": 3, "losses": [0.5]}, torch.ones(2), None])
def test_a_checkpoint_comes_back_from_a_file_of_torch(path, extra):
    model, optimizer = trained(stepwell.AdamW)
    scheduler = stepwell.lr_scheduler.StepLR(optimizer, 2)
    averaged = stepwell.swa_utils.AveragedModel(model)
    save(
        path,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        averaged=averaged,
        extra=extra,
    )
    source, before = path.with_name("run.pt"), str(to_torch(path))
    convert(path, source)
    made = convert(source, path)
    kept = "" if extra is None else "; extra: kept as extra"
    assert made == f"a checkpoint with model, averaged, optimizer, scheduler{kept}"
    assert str(to_torch(path)) == before
    assert str(load(path, averaged=averaged).extra) == str(extra)


def test_groups_take_names_one_after_the_other(path):
    """An order that is not the model's, as wherever some parameters do not decay."""

    def groups(model, named=False):
        pick = [(n, p) if named else p for n, p in model.named_parameters()]
        return [{"params": pick[1::2], "weight_decay": 0.0}, {"params": pick[::2]}]

    torch.manual_seed(0)
    model = layers()
    theirs = torch.optim.AdamW(groups(model))
    go_on(model, theirs, range(2))
    names = {param: name for name, param in model.named_parameters()}
    given = [names[p] for group in theirs.param_groups for p in group["params"]]
    with pytest.raises(
        CheckpointError, match=r"order of the optimizer, group after group \(it has"
    ):
        from_torch(theirs.state_dict(), path)
    words = "; names given to its 2 groups one after the other, in the optimizer's order"
    assert from_torch(theirs.state_dict(), path, given).endswith(words)
    again = layers()
    ours = stepwell.AdamW(groups(again, named=True))
    load(path, optimizer=ours)
    for (name, param), other in zip(again.named_parameters(), model.parameters(), strict=True):
        assert_same_bits(ours.state[param]["exp_avg"], theirs.state[other]["exp_avg"], name)


@pytest.mark.parametrize("layout", ["whole", "optimizer alone"])
def test_names_that_the_file_has_itself_are_not_replaced(path, capsys, layout):
    """State would go to other parameters of the same shape, and nobody would know."""
    square = lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))  # noqa: E731
    model, optimizer = trained(lambda params: stepwell.AdamW(reversed([*params])), model=square)
    source, names = path.with_name("swap.pt"), path.with_name("names.txt")
    state_dict = optimizer.state_dict()
    whole = {"model": model.state_dict(), "optimizer": state_dict}
    torch.save(whole if layout == "whole" else state_dict, source)
    known = [name for name, _ in model.named_parameters()]
    for given, how in ((known, "in another order than"), (["w", *known[2::-1]], "by other names")):
        names.write_text("\n".join(given))
        status, _, err = said(capsys, "convert", source, path, "--names", names)
        assert status == 1
        assert err.startswith(f"{source} names its parameters itself, {how}")
        assert err.endswith(": leave out the names\n")
        assert not path.exists()
    for given in (None, known[::-1]):
        convert(source, path, given)
        again, ours = trained(lambda params: stepwell.AdamW([*params]), 0, square)
        load(path, optimizer=ours)
        for (name, param), other in zip(again.named_parameters(), model.parameters(), strict=True):
            assert_same_bits(ours.state[param]["exp_avg"], optimizer.state[other]["exp_avg"], name)


def test_names_that_repeat_in_the_file_may_be_given_with_prefixes(path):
    models = nn.ModuleDict({"one": layers(), "two": layers()})
    both = [pair for model in models.values() for pair in model.named_parameters()]
    state_dict = torch.optim.AdamW(both).state_dict()
    with pytest.raises(CheckpointError, match="a name, is listed twice"):
        from_torch(state_dict, path)
    known = [name for name, _ in models.named_parameters()]
    with pytest.raises(CheckpointError, match="names its parameters itself, by other names"):
        from_torch(state_dict, path, known[::-1])
    from_torch(state_dict, path, known)
    load(path, optimizer=stepwell.AdamW(models.named_parameters()))


@pytest.mark.parametrize("way", ["same", "relative", "link", "hard link"])
@pytest.mark.parametrize("kind", ["torch", "checkpoint"])
def test_the_source_is_not_overwritten(path, monkeypatch, way, kind):
    source = path.with_suffix(".pt")
    model, _ = trained(stepwell.SGD, 0)
    if kind == "torch":
        torch.save(model.state_dict(), source)
    else:
        save(source, model=model)
    before, target = source.read_bytes(), path.with_name("other.pt")
    monkeypatch.chdir(path.parent)
    if way == "same":
        target = source
    elif way == "relative":
        target = Path("..") / path.parent.name / source.name
    elif way == "link":
        target.symlink_to(source)
    else:
        target.hardlink_to(source)
    with pytest.raises(CheckpointError, match="itself: give the target another name"):
        convert(source, target)
    assert source.read_bytes() == before


def test_a_file_of_torch_is_not_called_safetensors(path, capsys):
    model, _ = trained(stepwell.SGD, 0)
    save(path, model=model, with_random_state=True)
    target, link = path.with_name("b.Safetensors"), path.with_name("link.pt")
    link.symlink_to(target)
    for each in (target, link):
        status, _, err = said(capsys, "convert", path, each)
        assert status == 1
        assert f"{each}: the source is a checkpoint, of which a file of torch.save is made" in err
        assert not target.exists()
    target = path.with_name("c2.pt")
    assert said(capsys, "convert", path, target)[1] == (
        f"{target} is written, a file of torch.save with model; without the states of random "
        "number generators\n"
    )


class Payload:
    """What a pickle may do."""

    def __reduce__(self):
        return print, ("executed",)


def optimizer_of(*groups, state=()):
    return {"optimizer": {"state": dict(state), "param_groups": [*groups]}}


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
GROUP = {"params": [0], "param_names": ["w"]}
LARGE = torch.ones(1).expand(1 << 30, 1 << 10)
OTHERS = {
    "a payload": (Payload(), "holds print, which only code in the file could load"),
    "a payload inside": ({"optimizer": Payload()}, "holds print, which only code"),
    "a number": (3, "holds no state dicts, but is of type int"),
    "nothing": ({}, "holds neither"),
    "no optimizer": ({"optimizer": 3}, "holds neither"),
    "two optimizers": (
        {"optimizer": {"state": {}}, "optimizer_state_dict": {"state": {}}},
        "holds optimizer and optimizer_state_dict, of which only one can be converted",
    ),
    "no groups": ({"optimizer": {"state": {}}}, "param_groups"),
    "one group": ({"optimizer": {"state": {}, "param_groups": GROUP}}, "has a list of param_g"),
    "a group of none": (optimizer_of({"param_names": []}), "group 0 of the state dict has no"),
    "a parameter twice": (
        optimizer_of({"params": [0, 0], "param_names": ["v", "w"]}),
        "a parameter, or a name, is listed twice",
    ),
    "a name twice": (
        optimizer_of({"params": [0, 1], "param_names": ["w", "w"]}),
        "a parameter, or a name, is listed twice",
    ),
    "names that are lists": (optimizer_of({"params": [0], "param_names": [[]]}), "unhashable"),
    "a name with path parts": (
        optimizer_of({"params": [0], "param_names": ["/../w"]}, state={0: {"m": torch.ones(2)}}),
        "must not be named",
    ),
    "itself": ({"model": {}, "endless": ENDLESS}, r"\(list\) contains itself"),
    "a set": ({"model": {}, "set": {1}}, "has type set, which a checkpoint cannot hold"),
    "sparse": (optimizer_of(GROUP, state={0: {"m": torch.eye(2).to_sparse()}}), "only dense"),
    # 4 TB from a file of 1 KB
    "a model that repeats": ({"model": {"w": LARGE}}, "claims 4,398,046,511,104 bytes"),
    "state that repeats": (optimizer_of(GROUP, state={0: {"m": LARGE}}), "and holds 4"),
}


@pytest.mark.parametrize(("content", "words"), OTHERS.values(), ids=[*OTHERS])
def test_other_files_are_refused(path, capsys, content, words):
    source = path.with_name("run.pt")
    torch.save(content, source)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(source, path)
    assert str(caught.value).startswith(f"{source} ")
    source.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="and no file of torch"):
        convert(source, path)
    assert not path.exists()
    assert "executed" not in capsys.readouterr().out


def test_large_tensors_are_read_wherever_the_optimizer_has_them(path, monkeypatch):
    monkeypatch.setattr("stepwell.checkpoint.states.SMALL", 0)
    model, optimizer = trained(stepwell.AdamW)
    optimizer.param_groups[0]["note"] = {"in a group": torch.full((3,), 1.0)}
    optimizer.state["of all"] = [torch.full((3,), 2.0)]
    optimizer.state[model[0].bias]["own"] = ({"in a dict": torch.full((3,), 3.0)},)
    save(path, optimizer=optimizer)
    again, resumed = trained(stepwell.AdamW, 0)
    load(path, optimizer=resumed)
    assert_same(resumed.param_groups[0]["note"], optimizer.param_groups[0]["note"])
    assert_same(resumed.state["of all"], optimizer.state["of all"])
    assert_same(resumed.state[again[0].bias], optimizer.state[model[0].bias])


def test_a_model_alone(path):
    model, _ = trained(stepwell.SGD)
    source = path.with_name("model.pt")
    torch.save(model.state_dict(), source)
    convert(source, path)
    verify(path)
    again, _ = trained(stepwell.SGD, 0)
    load(path, model=again)
    assert_same_bits(again[0].weight, model[0].weight, "the weight")


def test_entries_that_only_sound_like_state_dicts_become_extra(path):
    model, _ = trained(stepwell.SGD)
    source = path.with_name("run.pt")
    torch.save({"model": "resnet50", "state_dict": model.state_dict(), "optim": "sgd"}, source)
    convert(source, path)
    again, _ = trained(stepwell.SGD, 0)
    assert load(path, model=again).extra == {"model": "resnet50", "optim": "sgd"}
    assert_same_bits(again[0].weight, model[0].weight, "the weight")


def test_a_full_disk_names_the_file_that_was_for_torch(path, tmp_path):
    save(path, extra=torch.ones(1 << 18))
    target = tmp_path / "run.pt"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(target))):
            convert(path, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [*tmp_path.iterdir()] == [path]
