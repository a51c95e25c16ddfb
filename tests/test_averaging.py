"""Are averages in the step torch's beside it, and do the trained weights always come back?"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.optim.swa_utils as theirs
from torch import Tensor, nn

import stepwell
from stepwell import averaged, averaged_weights, checkpoint
from stepwell.language import ClipNorm, DecoupledDecay

from .cases import NATIVE, REQUESTS, named, numbers, parameters, set_grads
from .compare import assert_same_bits, backends

SHAPES = ((4, 6), (7,), ())
EPS = torch.finfo(torch.float32).eps

AdamW = averaged(stepwell.AdamW)
SGD = averaged(stepwell.SGD)


def _steps(optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        set_grads(optimizer.param_groups[0]["params"], step)
        optimizer.step()


def _averages(optimizer: Any) -> list[Tensor]:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return [optimizer.state[param]["average"] for param in params]


def _trained(dtype: torch.dtype = torch.float32, steps: int = 3, **settings: Any) -> Any:
    optimizer = AdamW(parameters(SHAPES, dtype), lr=0.1, average_decay=0.75, **settings)
    _steps(optimizer, 0, steps)
    return optimizer


def _copies(tensors: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _assert_same(found: Any, expected: Any) -> None:
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(one.detach(), other.detach(), f"tensor {row}")


# Averages in the step: torch's beside it


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_an_average_in_the_step_is_torchs_beside_it(rule: str, request_: str) -> None:
    plain, options = getattr(torch.optim, rule), {"lr": 0.05}
    ours = averaged(getattr(stepwell, rule))(
        parameters(SHAPES, torch.float32), average_decay=0.9, **options, **REQUESTS[request_]
    )
    model = nn.ParameterList(parameters(SHAPES, torch.float32))
    right = plain(list(model), **options)
    beside = theirs.AveragedModel(model, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.9))
    for step in range(20):
        _steps(ours, step, step + 1)
        _steps(right, step, step + 1)
        beside.update_parameters(model)
        for average, expected in zip(_averages(ours), beside.parameters(), strict=True):
            # AdamW's parameters differ by some ULP, and so do their averages
            torch.testing.assert_close(average, expected.detach(), rtol=16 * EPS, atol=16 * EPS)
    assert backends(ours) == {request_}


def _weights(count: int, decay: float, warmup: float) -> Iterator[float]:
    """The weight of each average, as the sources give it."""
    for n in range(count):
        if n == 0:
            yield 1.0
        elif warmup == 9:
            # TensorFlow: min(decay, (1 + t) / (10 + t)), the first average being a copy
            yield 1 - min(decay, n / (9 + n))
        elif warmup == 1:
            # Izmailov et al.: (n average + p) / (n + 1)
            yield max(1 / (n + 1), 1 - decay)
        else:
            yield 1 - decay


SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every step": ({}, list(range(12))),
    "warm-up": ({"average_warmup": 9}, list(range(12))),
    "warm-up that ends": ({"average_warmup": 9, "average_decay": 0.3}, list(range(12))),
    "equal weights": ({"average_warmup": 1, "average_decay": 1.0}, list(range(12))),
    "late": ({"average_start": 4}, list(range(4, 12))),
    "every third": ({"average_every": 3}, [0, 3, 6, 9]),
    "stochastic weight averaging": (
        {"average_warmup": 1, "average_decay": 1, "average_start": 3, "average_every": 2},
        [3, 5, 7, 9, 11],
    ),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_when_and_how_much_is_averaged(name: str, request_: str) -> None:
    """The oracle: the formula of the source, in float64, over the parameters as they were."""
    settings, taken = SCHEDULES[name]
    settings = {"average_decay": 0.9, **settings}
    optimizer = SGD(parameters(SHAPES, torch.float32), lr=0.1, **settings, **REQUESTS[request_])
    params = optimizer.param_groups[0]["params"]
    expected = [param.detach().double() for param in params]
    warmup = settings.get("average_warmup", 0)
    weights = dict(zip(taken, _weights(len(taken), settings["average_decay"], warmup), strict=True))
    for step in range(12):
        _steps(optimizer, step, step + 1)
        # before the first, the average is the parameter
        weight = weights.get(step, 0.0 if step > taken[0] else 1.0)
        for row, param in enumerate(params):
            expected[row] = expected[row] + weight * (param.detach().double() - expected[row])
            average = optimizer.state[param]["average"]
            torch.testing.assert_close(average, expected[row].float(), rtol=8 * EPS, atol=8 * EPS)
            assert optimizer.state[param]["n_averaged"] == sum(k <= step for k in taken)
    assert backends(optimizer) == {request_}


def test_steps_between_averages_leave_them_alone() -> None:
    """Whatever the parameters are: a product with weight 0 would be NaN."""
    optimizer = SGD(parameters(SHAPES, torch.float32), lr=0.1, average_every=3)
    _steps(optimizer, 0, 1)
    before = _copies(_averages(optimizer))
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, torch.inf)
    optimizer.step()
    _assert_same(_averages(optimizer), before)


@pytest.mark.parametrize("dtype", **named((torch.bfloat16, torch.float16)))
@pytest.mark.parametrize("how", ["saved", "param", "torch.bfloat16", "by torch"])
def test_averages_stay_wide_in_whatever_precision_state_is_loaded(
    how: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In half precision they would stop moving, as torch's do."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    rule = stepwell.averaged(stepwell.AdamW)
    optimizer = rule([("weight", weight)], lr=0.1, average_decay=0.999)
    for step in range(3):
        weight.grad = torch.full_like(weight, 1.0 + step)
        optimizer.step()
    average = optimizer.state[weight]["average"].clone()
    resumed = rule([("weight", weight)])
    if how == "by torch":
        # whose optimizers cast all state to the dtype of its parameter
        theirs = torch.optim.AdamW([("weight", weight)])
        theirs.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(theirs.state_dict())
        average = average.to(dtype).float()
    else:
        policy = torch.bfloat16 if how.startswith("torch") else how
        resumed.load_state_dict(optimizer.state_dict(), dtype=policy)
        checkpoint.save(tmp_path / "a.safetensors", optimizer=optimizer)
        fromfile = rule([("weight", weight)])
        checkpoint.load(tmp_path / "a.safetensors", optimizer=fromfile, dtype=policy)
        assert torch.equal(fromfile.state[weight]["average"], average)
    assert resumed.state[weight]["average"].dtype is torch.float32
    assert torch.equal(resumed.state[weight]["average"], average)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("dtype", **named((torch.bfloat16, torch.float16)))
def test_averages_of_half_precision_are_kept_in_float32(dtype: torch.dtype, request_: str) -> None:
    """In half precision an average stops where a step adds less than half a unit."""
    [param] = parameters(((50,),), dtype)
    optimizer = SGD([param], lr=2**-4, average_decay=0.999, **REQUESTS[request_])
    expected = None
    for step in range(60):
        param.grad = torch.full_like(param, 1.0 if step < 8 else 0.0)
        optimizer.step()
        latest = param.detach().float()
        # what the step computes is averaged before it is rounded: exact here, by the numbers chosen
        expected = latest if expected is None else expected + 0.001 * (latest - expected)
    average = optimizer.state[param]["average"]
    assert average.dtype is torch.float32
    assert backends(optimizer) == {request_}
    # rounding of the parameter, of which a share of 0.001 is taken 60 times
    torch.testing.assert_close(average, expected, rtol=0, atol=0.06 * 4 * torch.finfo(dtype).eps)
    in_half = numbers((50,), dtype, 0) * 0 + 1
    assert torch.equal(torch.lerp(in_half, in_half - 2**-4, 0.001), in_half)


def test_a_skipped_step_and_a_missing_gradient_average_nothing() -> None:
    optimizer = AdamW(parameters(SHAPES, torch.float32), lr=0.1, average_decay=0.5)
    params = optimizer.param_groups[0]["params"]
    _steps(optimizer, 0, 2)
    before = _copies(_averages(optimizer))
    params[0].grad = None
    optimizer.step()
    after = _averages(optimizer)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_the_average_comes_after_all_else() -> None:
    """`averaged` puts it outermost, whatever the rule is composed with."""
    rule = averaged(stepwell.compose(stepwell.SGD, ClipNorm, DecoupledDecay))
    [param] = parameters(((5,),), torch.float32)
    optimizer = rule([param], lr=0.1, max_norm=0.5, decoupled_decay=0.3, average_decay=0.75)
    expected = None
    for step in range(3):
        set_grads([param], step)
        optimizer.step()
        latest = param.detach().clone()
        expected = latest if expected is None else torch.lerp(expected, latest, 0.25)
    torch.testing.assert_close(optimizer.state[param]["average"], expected)
    assert backends(optimizer) == {NATIVE}


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"average_decay": 1.5}, "Invalid average_decay value: 1.5 .* must be a number in"),
        ({"average_decay": float("nan")}, "Invalid average_decay value: nan"),
        ({"average_warmup": -1}, "Invalid average_warmup value: -1"),
        ({"average_start": -1}, "Invalid average_start value: -1 .* a whole number in"),
        ({"average_every": 0}, r"Invalid average_every value: 0 .* a whole number in \[1, inf"),
    ],
)
def test_what_cannot_be_averaged_by(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdamW(parameters(SHAPES, torch.float32), **settings)


@pytest.mark.tiny
def test_rules_that_are_no_formula_are_refused() -> None:
    for rule in (stepwell.Muon, stepwell.LBFGS):
        with pytest.raises(TypeError, match=f"averaged: {rule.__name__} is not a per-element form"):
            averaged(rule)
    with pytest.raises(TypeError, match="compose: rule must be an optimizer class"):
        averaged(torch.optim.AdamW)  # type: ignore[arg-type]
    # whose repr would go on for lines
    made = stepwell.AdamW([nn.Parameter(torch.ones(1))])
    words = r"rule must be a class, got an instance of AdamW; use"
    with pytest.raises(
        TypeError, match=rf"^averaged: {words} averaged\(AdamW\)\(params, \.\.\.\)$"
    ):
        averaged(made)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=rf"^compose: {words} compose\(AdamW, \.\.\.\)\(params, "):
        stepwell.compose(made, ClipNorm)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ClipNorm is a class to compose .* \(max_norm=\.\.\.\)"):
        stepwell.compose(AdamW, ClipNorm(1.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"averaged: AdamW\+Average keeps an average already"):
        averaged(AdamW)


# Checkpoints


BEGUN = r"\(the state dict has none; strict=False begins it anew\)"


def _named() -> list[tuple[str, nn.Parameter]]:
    return [(f"w{i}", param) for i, param in enumerate(parameters(SHAPES, torch.float32))]


@pytest.mark.parametrize("by_name", [True, False])
def test_averages_are_saved_and_loaded(by_name: bool) -> None:
    """Stopped and resumed, by name in another order, the averages are the same to the bit."""
    settings = {"lr": 0.1, "average_warmup": 9, "average_start": 2, "average_every": 2}
    members = _named()
    optimizer = AdamW(members if by_name else [p for _, p in members], **settings)
    params = [param for _, param in members]
    copies = [(name, nn.Parameter(param.detach().clone())) for name, param in members]
    for step in range(9):
        if step == 5:
            saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
            for (_, copy), param in zip(copies, params, strict=True):
                copy.data.copy_(param)
            listed = copies[::-1] if by_name else [p for _, p in copies]
            resumed = AdamW(listed, lr=0.5)
            assert resumed.load_state_dict(saved).is_empty
        set_grads(params, step)
        optimizer.step()
        if step >= 5:
            set_grads([copy for _, copy in copies], step)
            resumed.step()
    assert resumed.param_groups[0]["average_every"] == 2
    for (_, copy), param in zip(copies, params, strict=True):
        assert torch.equal(copy, param)
        for key, value in optimizer.state[param].items():
            assert torch.equal(resumed.state[copy][key], value), key


@pytest.mark.parametrize("saver", [stepwell.AdamW, torch.optim.AdamW])
def test_a_checkpoint_without_averages(saver: Any) -> None:
    """Refused, with what is missing; or the moments are loaded, and averages begin anew."""
    plain = saver(parameters(SHAPES, torch.float32), lr=0.1)
    _steps(plain, 0, 4)
    optimizer = _trained(steps=2)
    params = optimizer.param_groups[0]["params"]
    before = _copies(_averages(optimizer))
    with pytest.raises(ValueError, match=f"missing: .* 0\\): average {BEGUN}\\n"):
        optimizer.load_state_dict(plain.state_dict())
    _assert_same(_averages(optimizer), before)
    report = optimizer.load_state_dict(plain.state_dict(), strict=False)
    assert len(report.missing) == 2 * len(SHAPES)
    assert report.unexpected == report.mismatched == ()
    for param, old in zip(params, plain.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[param]["exp_avg"], plain.state[old]["exp_avg"])
        assert "average" not in optimizer.state[param]
    with averaged_weights(optimizer):
        pass
    _steps(optimizer, 4, 5)
    for param in params:
        assert torch.equal(optimizer.state[param]["average"], param)
        assert optimizer.state[param]["step"] == 5
        assert optimizer.state[param]["n_averaged"] == 1


def test_a_checkpoint_of_the_moments_alone_that_lacks_one_is_not_loaded() -> None:
    plain, optimizer = stepwell.AdamW(parameters(SHAPES, torch.float32)), _trained()
    _steps(plain, 0, 4)
    saved = deepcopy(plain.state_dict())
    del saved["state"][0]["exp_avg"]
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    before = _copies(state.values())
    report = optimizer.load_state_dict(saved, strict=False)
    assert any(entry.endswith(": exp_avg") for entry in report.missing)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    _assert_same(state.values(), before)


@pytest.mark.parametrize("passed_on", [False, True])
def test_a_rule_that_keeps_no_averages_does_not_carry_them_along(
    passed_on: bool, tmp_path: Path
) -> None:
    """Refused, as a file too; or the moments are loaded, and the averages are left out."""
    donor: Any = AdamW(_named(), lr=0.1)
    _steps(donor, 0, 3)
    if passed_on:
        # torch's class takes them, and gives them back
        passer = torch.optim.AdamW(_named())
        passer.load_state_dict(donor.state_dict())
        donor = passer
    plain = stepwell.AdamW(_named(), lr=0.5)
    stepwell.checkpoint.save(tmp_path / "run", optimizer=donor)
    said = re.escape("unexpected: group 0: average, n_averaged of Average (compose(AdamW, Average)")
    with pytest.raises(ValueError, match=said):
        plain.load_state_dict(donor.state_dict())
    with pytest.raises(ValueError, match=said):
        stepwell.checkpoint.load(tmp_path / "run", optimizer=plain)
    assert not plain.state
    assert plain.param_groups[0]["lr"] == 0.5
    report = plain.load_state_dict(donor.state_dict(), strict=False)
    assert (len(report.unexpected), report.missing, report.mismatched) == (1, (), ())
    assert plain.param_groups[0]["lr"] == 0.1
    assert not any(key.startswith("average") for key in plain.param_groups[0])
    moments = {"step", "exp_avg", "exp_avg_sq"}
    assert [set(state) for state in plain.state.values()] == [moments] * len(SHAPES)
    _steps(plain, 3, 4)
    assert {int(state["step"]) for state in plain.state.values()} == {4}


def test_torch_takes_a_checkpoint_with_averages_and_gives_it_back() -> None:
    ours = _trained()
    torchs = torch.optim.AdamW(parameters(SHAPES, torch.float32))
    torchs.load_state_dict(ours.state_dict())
    again = AdamW(parameters(SHAPES, torch.float32))
    assert again.load_state_dict(torchs.state_dict()).is_empty
    _assert_same(_averages(again), _averages(ours))


# The averaged weights in the model, and back


@pytest.mark.parametrize(
    "dtype", **named((torch.float32, torch.float64, torch.bfloat16, torch.complex64))
)
def test_the_trained_weights_come_back(dtype: torch.dtype) -> None:
    optimizer = _trained(dtype)
    params = optimizer.param_groups[0]["params"]
    before, averages = _copies(params), _copies(_averages(optimizer))
    addresses = [param.data_ptr() for param in params]
    with averaged_weights(optimizer):
        _assert_same(_copies(params), [a.to(dtype) for a in averages])
        assert [param.data_ptr() for param in params] == addresses
    _assert_same(_copies(params), before)
    _assert_same(_averages(optimizer), averages)
    _steps(optimizer, 3, 4)
    control = _trained(dtype, steps=4)
    _assert_same(_copies(params), _copies(control.param_groups[0]["params"]))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_trained_weights_come_back_when_the_body_raises(error: type[BaseException]) -> None:
    optimizer = _trained()
    params = optimizer.param_groups[0]["params"]
    before, averages = _copies(params), _copies(_averages(optimizer))
    with pytest.raises(error), averaged_weights(optimizer):
        raise error
    _assert_same(_copies(params), before)
    _assert_same(_averages(optimizer), averages)
    _steps(optimizer, 3, 4)


INSIDE: dict[str, Callable[[Any], Any]] = {
    "be copied or pickled": deepcopy,
    "be copied": pickle.dumps,
    "take a step": lambda optimizer: optimizer.step(),
    "make a state dict": lambda optimizer: optimizer.state_dict(),
    "load a state dict": lambda optimizer: optimizer.load_state_dict({}),
}


@pytest.mark.parametrize("what", INSIDE)
def test_what_would_see_the_wrong_weights_is_refused_inside(what: str) -> None:
    optimizer = _trained()
    params = optimizer.param_groups[0]["params"]
    before = _copies(params)
    said = rf"^cannot {what}.* inside averaged_weights: the parameters are their averages, .* leave"
    with averaged_weights(optimizer):
        inside = _copies(params)
        with pytest.raises(RuntimeError, match=said):
            INSIDE[what](optimizer)
        _assert_same(_copies(params), inside)
    _assert_same(_copies(params), before)
    optimizer.load_state_dict(optimizer.state_dict())
    deepcopy(optimizer).step()
    optimizer.step()


def test_inside_of_itself_it_does_nothing() -> None:
    optimizer = _trained()
    params = optimizer.param_groups[0]["params"]
    before = _copies(params)
    with averaged_weights(optimizer):
        inside = _copies(params)
        with averaged_weights(optimizer):
            _assert_same(_copies(params), inside)
        _assert_same(_copies(params), inside)
        with pytest.raises(RuntimeError, match="cannot take a step"):
            optimizer.step()
    _assert_same(_copies(params), before)


def test_parameters_without_an_average_are_left_alone() -> None:
    """No step yet, or none for some of them."""
    params = parameters(SHAPES, torch.float32)
    optimizer = AdamW(params, lr=0.1, average_decay=0.5)
    before = _copies(params)
    with averaged_weights(optimizer):
        _assert_same(_copies(params), before)
    params[1].grad = torch.ones_like(params[1])
    for _ in range(2):
        optimizer.step()
    average = optimizer.state[params[1]]["average"].clone()
    with averaged_weights(optimizer):
        _assert_same(_copies(params), [before[0], average, before[2]])


@pytest.mark.parametrize(
    "make", [stepwell.AdamW, stepwell.LBFGS, torch.optim.AdamW], ids=["rule", "no formula", "torch"]
)
def test_optimizers_without_averages_are_refused(make: Any) -> None:
    optimizer = make(parameters(SHAPES, torch.float32))
    with (
        pytest.raises(TypeError, match=r"averaged_weights: \w+ keeps no averages; make it with"),
        averaged_weights(optimizer),
    ):
        pass


def test_views_ties_and_graphs_see_the_averages() -> None:
    """Contents change places, addresses stay: whoever points at a parameter sees its average."""
    layer = nn.Linear(3, 3, bias=False)
    tied = nn.Sequential(layer, nn.Linear(3, 3, bias=False))
    tied[1].weight = layer.weight
    view = layer.weight.detach()[1]
    optimizer = SGD(tied.parameters(), lr=0.1, average_decay=0.5)
    _steps(optimizer, 0, 3)
    before = view.clone()
    average = _averages(optimizer)[0].clone()
    with averaged_weights(optimizer):
        assert torch.equal(view, average[1])
        assert torch.equal(tied[1].weight, average)
    assert torch.equal(view, before)


def test_parameters_that_overlap_come_back() -> None:
    flat = numbers((8,), torch.float32, 1)
    params = [nn.Parameter(flat), nn.Parameter(flat[2:6].view(2, 2)), nn.Parameter(flat[::2])]
    optimizer = SGD(params, lr=0.1, average_decay=0.5)
    _steps(optimizer, 0, 3)
    before, averages = _copies(params), _copies(_averages(optimizer))
    with averaged_weights(optimizer):
        pass
    _assert_same(_copies(params), before)
    _assert_same(_copies(_averages(optimizer)), averages)


def test_layouts_of_memory() -> None:
    image = numbers((2, 3, 4, 4), torch.float32, 1).to(memory_format=torch.channels_last)
    wide = numbers((4, 6), torch.float32, 2)[:, ::2]
    params = [nn.Parameter(image), nn.Parameter(wide), nn.Parameter(torch.empty(0, 3))]
    optimizer = SGD(params, lr=0.1, average_decay=0.5)
    _steps(optimizer, 0, 3)
    before, averages = _copies(params), _copies(_averages(optimizer))
    with averaged_weights(optimizer):
        _assert_same(_copies(params), averages)
    _assert_same(_copies(params), before)
    _assert_same(_copies(_averages(optimizer)), averages)


def test_more_than_a_buffer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepwell.averaging, "CHUNK", 5)
    test_the_trained_weights_come_back(torch.float32)


def test_parameters_that_move_inside_come_back() -> None:
    optimizer = _trained()
    params = optimizer.param_groups[0]["params"]
    before, averages = _copies(params), _copies(_averages(optimizer))
    with averaged_weights(optimizer):
        for param in params:
            param.data = param.data.clone()
    _assert_same(_copies(params), before)
    _assert_same(_copies(_averages(optimizer)), averages)


def test_parameters_that_are_changed_inside_are_reported() -> None:
    optimizer = _trained()
    params = optimizer.param_groups[0]["params"]
    before = _copies(params)
    with (
        pytest.raises(RuntimeError, match="averaged_weights: 1 parameters were changed inside"),
        averaged_weights(optimizer),
        torch.no_grad(),
    ):
        params[0].mul_(2)
    _assert_same(_copies(params), before)


def test_an_average_of_another_shape_is_refused_before_anything_changes() -> None:
    optimizer = _trained()
    params = optimizer.param_groups[0]["params"]
    before = _copies(params)
    optimizer.state[params[1]]["average"] = torch.zeros(3)
    with (
        pytest.raises(ValueError, match=r"parameter 1 has shape \(3,\), its parameter \(7,\)"),
        averaged_weights(optimizer),
    ):
        pass
    _assert_same(_copies(params), before)


def test_statistics_of_batches_are_taken_anew_inside_and_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    optimizer = AdamW(model.parameters(), lr=0.1, average_decay=0.5)
    batches = [numbers((8, 4), torch.float32, i) for i in range(3)]
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    before = deepcopy(model.state_dict())
    with averaged_weights(optimizer, model):
        copy = deepcopy(model)
        theirs.update_bn(batches, copy)
        stepwell.swa_utils.update_bn(batches, model)
        for name, value in copy.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_backward_inside_through_weights_from_outside_is_an_error() -> None:
    """Autograd sees that the weights are not those of the forward pass."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    _steps(optimizer, 0, 2)
    loss = model(torch.ones(1, 2)).sum()
    with averaged_weights(optimizer), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_memory_is_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made to change places is one buffer, however many parameters there are."""
    made: list[int] = []
    empty = torch.empty

    def counted(size: Any, **kwargs: Any) -> Tensor:
        made.append(size)
        return empty(size, **kwargs)

    optimizer = _trained()
    monkeypatch.setattr(torch, "empty", counted)
    with averaged_weights(optimizer):
        pass
    assert made == [stepwell.averaging.CHUNK] * 2
