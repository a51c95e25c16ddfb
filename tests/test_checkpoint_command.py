"""Does `python -m stepwell checkpoint` say what is so, and does torch read what it converts?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import stepwell
from stepwell.__main__ import main
from stepwell.checkpoint import CheckpointError, convert, load, save, to_torch, verify

from .cases import PLAIN, named, numbers
from .compare import assert_same_bits, assert_same_training


def trained(make, steps=3):
    """A model, and an optimizer after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(model.named_parameters())
    go_on(model, optimizer, range(steps))
    return model, optimizer


def go_on(model, optimizer, steps=range(3, 6)):
    for step in steps:
        optimizer.zero_grad()
        model(numbers((5, 3), torch.float32, step)).square().sum().backward()
        optimizer.step()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


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
        "(2,)", "float32", f"{float(moment.double().norm()):.4g}", "8", "3",
    ]  # fmt: skip


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

each_rule = pytest.mark.parametrize("case", **named(PLAIN))


@each_rule
def test_torch_goes_on_from_a_converted_file(path, case):
    model, optimizer = trained(case.make)
    save(path, model=model, optimizer=optimizer)
    target = path.with_name("run.pt")
    convert(path, target)
    content = torch.load(target, weights_only=True)
    again, _ = trained(case.make, 0)
    again.load_state_dict(content["model"])
    theirs = case.make_twin(again.named_parameters())
    theirs.load_state_dict(content["optimizer"])
    assert_same_training(theirs, optimizer, "as converted")
    assert str(to_torch(path)["optimizer"]) == str(content["optimizer"])


@each_rule
@pytest.mark.parametrize("layout", ["whole", "optimizer alone"])
def test_a_file_of_torch_becomes_a_checkpoint(path, capsys, case, layout):
    model, theirs = trained(case.make_twin)
    source, names = path.with_name("run.pt"), path.with_name("names.txt")
    state_dict = theirs.state_dict()
    for group in state_dict["param_groups"]:
        # most people's have none
        group.pop("param_names")
    whole = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": state_dict,
        "epoch": 7,
    }
    torch.save(whole if layout == "whole" else state_dict, source)
    names.write_text("\n".join(name for name, _ in model.named_parameters()) + "\n")
    assert said(capsys, "convert", source, path, "--names", names)[0] == 0
    again, ours = trained(case.make, 0)
    if layout == "whole":
        assert load(path, model=again, optimizer=ours).extra == {"epoch": 7}
        for one, other in zip(again.parameters(), model.parameters(), strict=True):
            assert_same_bits(one, other, "a parameter")
    else:
        load(path, optimizer=ours)
        again.load_state_dict(model.state_dict())
    assert_same_training(ours, theirs, "as converted")


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
    assert not path.exists()


class Payload:
    """What a pickle may do."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [Payload(), 3, {}, {"optimizer": 3}, {"optimizer": Payload()}])
def test_other_files_are_refused(path, capsys, content):
    source = path.with_name("run.pt")
    torch.save(content, source)
    with pytest.raises(CheckpointError):
        convert(source, path)
    source.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="and no file of torch"):
        convert(source, path)
    assert not path.exists()
    assert "executed" not in capsys.readouterr().out


def test_a_model_alone(path):
    model, _ = trained(stepwell.SGD)
    source = path.with_name("model.pt")
    torch.save(model.state_dict(), source)
    convert(source, path)
    verify(path)
    again, _ = trained(stepwell.SGD, 0)
    load(path, model=again)
    assert_same_bits(again[0].weight, model[0].weight, "the weight")


def test_the_page_of_checkpoints_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for code in blocks:
        exec(compile(code, "docs/checkpoints.md", "exec", dont_inherit=True), names)
    assert names["epoch"] == 3
    assert_same_bits(names["tensors"]["model.weight"], names["model"].weight, "the weight")
    assert names["names"] == "weight\nbias"
