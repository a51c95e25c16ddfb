"""Do `show` and `diff` say all there is, and can it be read?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stepwell
from stepwell.__main__ import main
from stepwell.checkpoint import CheckpointError, command, folder, save, verify


def said(capsys, *arguments):
    status = main(["checkpoint", *map(str, arguments)])
    return status, capsys.readouterr().out


def rows(out):
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}


def diff(path, capsys, one, other):
    """What `diff` says of two values, by name."""
    second = path.with_name("other.safetensors")
    save(path, extra=one)
    save(second, extra=other)
    status, out = said(capsys, "diff", path, second)
    assert status == ("no difference" not in out)
    return rows(out) if status else {}


same = torch.ones(3)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([float("nan"), 1.0]),
        torch.tensor([-0.0, 1.0]),
        {"a": [1, (2.5, None)], 3: {}, "t": torch.arange(5)},
        [same, same],
        float("nan"),
    ],
)
def test_no_difference(path, capsys, value):
    assert diff(path, capsys, value, value) == {}


def test_the_order_of_a_dict_is_no_difference(path, capsys):
    assert diff(path, capsys, {"a": 1, "b": 2}, {"b": 2, "a": 1}) == {}


big = 2**53


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([big, 1], [big + 1, 1], ["values", "1", "1", "of", "2"]),
        ([-(2**63), 2**63 - 1], [2**63 - 1] * 2, ["values", "1.845e+19", "1", "of", "2"]),
        ([0.0, 1.0], [-0.0, 1.0], ["signs", "of", "zeros", "0", "1", "of", "2"]),
        ([1.0, 2.0], [1.0, float("nan")], ["values", "nan", "1", "of", "2"]),
        ([float("inf")] * 2, [float("inf"), -float("inf")], ["values", "inf", "1", "of", "2"]),
        ([True, False], [True, True], ["values", "1", "1", "of", "2"]),
        ([1, 2], [1.0, 2.0], ["int64", "(2,)", "->", "float32", "(2,)"]),
    ],
)
def test_tensors_that_differ_in_a_bit(path, capsys, one, other, expected):
    found = diff(path, capsys, torch.tensor(one), torch.tensor(other))
    assert found["extra"] == expected


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint64, torch.bfloat16, torch.float8_e5m2]
)
def test_kinds_of_elements(path, capsys, dtype):
    one, other = (torch.tensor(values).to(dtype) for values in ([1, 2], [1, 4]))
    assert diff(path, capsys, one, other)["extra"] == ["values", "2", "1", "of", "2"]


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (1, "1", {"extra": "1 -> '1'"}),
        (1, True, {"extra": "1 -> True"}),
        (1, 1.0, {"extra": "1 -> 1.0"}),
        (0.0, -0.0, {"extra": "0.0 -> -0.0"}),
        ({"a": None}, {"a": "None"}, {"extra.a": "None -> 'None'"}),
        ({}, {"a": {}}, {"extra.a": "nothing -> {}"}),
        ({"a": []}, {"a": {}}, {"extra.a": "[] -> {}"}),
        ({1: 5}, {"1": 5}, {"extra.[1]": "5 -> nothing", "extra.1": "nothing -> 5"}),
        ({1: 5}, {"[1]": 5}, {"extra.[1]": "5 -> nothing", "extra.['[1]']": "nothing -> 5"}),
        ({"a": same, "b": same}, {"a": same}, {"extra.b": "the tensor extra.a -> nothing"}),
        ([1, 2], (1, 2), {"extra": "[1, 2] -> (1, 2)"}),
        ([1], [1, 2], {"extra.1": "nothing -> 2"}),
        (
            {"a": {"b": 1}},
            {"a.b": 1},
            {"extra.a.b": "1 -> nothing", "extra.['a.b']": "nothing -> 1"},
        ),
        (torch.tensor(1.0), torch.tensor(1), {"extra": "1.0 (float32) -> 1 (int64)"}),
        (torch.float32, torch.float64, {"extra": "torch.float32 -> torch.float64"}),
        (
            [same, same],
            [same, same.clone()],
            {"extra.1": "the tensor extra.0 -> the tensor extra.1"},
        ),
    ],
)
def test_values_that_differ(path, capsys, one, other, expected):
    found = diff(path, capsys, one, other)
    assert {name: found[name] for name in expected} == {
        name: change.split() for name, change in expected.items()
    }


def test_damage_is_no_equality(path, capsys):
    """Digests in the headers are the same."""
    save(path, extra=torch.ones(9))
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError):
        verify(other)
    for pair in ((path, other), (other, path)):
        assert said(capsys, "diff", *pair)[0] == 1


@pytest.fixture
def training():
    """One group of weights and one of biases, the last of which is not trained."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    params = dict(model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in params.items() if kind in name]}
        for kind in ("weight", "bias")
    ]
    params["3.bias"].requires_grad_(False)
    return model, stepwell.AdamW(groups)


def step(model, optimizer):
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


def test_parameters_are_listed_by_their_groups(path, capsys, training):
    step(*training)
    save(path, optimizer=training[1])
    out = said(capsys, "show", path)[1]
    found = rows(out)
    assert found["0.weight"] == ["0", "(6,", "6)", "float32", "1"]
    assert found["2.bias"] == ["1", "(6,)", "float32", "1"]
    assert found["3.bias"] == ["1", "(6,)", "float32", "no", "state"]
    assert out.index(" 3.weight ") < out.index(" 0.bias ")


def test_when_it_was_saved(path, capsys, monkeypatch):
    monkeypatch.setattr(folder.time, "time_ns", lambda: 1_700_000_000_123_456_789)
    save(path, extra=1)
    out = said(capsys, "show", path)[1]
    assert f"with torch {torch.__version__} at 2023-11-14 22:13:20 UTC\n" in out


def test_steps_that_differ_alike_are_one_row(path, capsys, training):
    other = path.with_name("other")
    step(*training)
    save(path, optimizer=training[1])
    step(*training)
    save(other, optimizer=training[1])
    found = rows(said(capsys, "diff", path, other)[1])
    alike = ["1.0", "(float32)", "->", "2.0", "(float32)", "7", "of", "7"]
    assert found["optimizer.state.*.step"] == alike
    assert sum(name.startswith("optimizer.state") for name in found) == 1
    assert sum(name.endswith(".exp_avg") for name in found) == 7


def test_state_that_only_one_has(path, capsys, training):
    other = path.with_name("other")
    save(path, optimizer=training[1])
    step(*training)
    save(other, optimizer=training[1])
    found = rows(said(capsys, "diff", path, other)[1])
    assert found["optimizer.state.*.step"] == ["nothing", "->", "1.0", "(float32)", "7", "of", "7"]
    assert found["optimizer.0.weight.exp_avg"] == ["only", "in", "the", "second"]
    assert not any(name.startswith("optimizer.state") and "exp_avg" in name for name in found)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_terminals(path, capsys, training, monkeypatch, columns):
    """Long names are folded, once at most, and no line is longer than the terminal is wide."""
    step(*training)
    save(path, model=training[0], optimizer=training[1])
    monkeypatch.setattr(command, "WIDTH", columns)
    out = said(capsys, "show", path)[1]
    assert max(map(len, out.splitlines())) <= columns
    first = out[out.index("optimizer.") :].splitlines()
    name = "optimizer.0.bias.exp_avg"
    assert first[0].split()[0] + ("" if columns > 60 else first[1].strip()) == name
    assert sum("float32" in line for line in out.splitlines()) == 8 + 8 + 14


def test_a_pipe_gets_a_line_for_each_tensor(path, capsys):
    name = "a" * 300
    save(path, extra={name: torch.ones(2)})
    assert rows(said(capsys, "show", path)[1])[f"extra.{name}"][0] == "(2,)"
