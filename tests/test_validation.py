"""Is every value that a hyperparameter cannot take refused, at every door, before any change?"""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

import stepwell
from stepwell.language import Decay
from stepwell.language.fields import Field, Range

from .cases import PLAIN
from .shell_cases import (
    SignDescent,
    assert_same,
    fill_grads,
    ours,
    refused,
    snapshot,
    train,
    weights,
)

NOT_NUMBERS = ("0.1", None, True, [0.1], b"0.1")
NOT_FLAGS = [2, 0.5, "True", torch.tensor(True)]
NOT_PAIRS = (0.9, "ab", (0.9,), (0.9, 0.9, 0.9), {0.9: 1, 0.8: 1}, (0.9, torch.tensor(0.9)))


def bad_numbers(field):
    yield from (math.nan, math.inf, -math.inf, torch.tensor(math.nan), torch.ones(2))
    yield from (v for v in NOT_NUMBERS if v is not None or not field.optional)
    if field.range.low > -math.inf:
        yield from (field.range.low - 1e-9, torch.tensor(field.range.low - 1.0))
    if ")" in field.range.open:
        yield field.range.high


def bad_values(field):
    if field.fixed:
        return [not field.default]
    if field.kind == "flag":
        return [v for v in (*NOT_FLAGS, None) if v is not None or not field.optional]
    if field.kind == "tuple":
        first, second = (list(bad_numbers(item)) for item in field.items)
        return [*NOT_PAIRS, *((v, 0.5) for v in first), *((0.5, v) for v in second)]
    return list(bad_numbers(field))


CLASSES = [*dict.fromkeys(case.rule for case in PLAIN), SignDescent]
# the first of each kind: what a value may be depends on nothing but these
FIELDS = list(
    {
        (field.name, field.kind, field.allowed, field.fixed): (cls, field)
        for cls in reversed(CLASSES)
        for field in cls.declaration.fields.values()
    }.values()
)
EXECUTION = ("foreach", "fused", "capturable", "differentiable")
SAVED = [(cls, f) for cls, f in FIELDS if not f.fixed and f.name not in EXECUTION]


def bad(fields):
    return [
        pytest.param(cls, field.name, value, id=f"{cls.__name__}-{field.name}-{value}"[:60])
        for cls, field in fields
        for value in bad_values(field)
    ]


def the_words(error, cls, name, place):
    assert type(error) in (TypeError, ValueError), repr(error)
    said = str(error)
    assert cls.__name__ in said
    assert name in said
    assert place in said
    return said


@pytest.mark.parametrize(("cls", "name", "value"), bad(FIELDS))
def test_refused_at_every_door(cls, name, value):
    if not cls.declaration.fields[name].fixed:
        the_words(refused(lambda: cls(weights(), **{name: value})), cls, name, "")
    given = [{"params": weights()}, {"params": weights(), name: value}]
    the_words(refused(lambda: cls(given)), cls, name, "group 1")

    optimizer = cls(weights())
    before = snapshot(optimizer)
    more = {"params": weights(), name: value}
    kept = dict(more)
    the_words(refused(lambda: optimizer.add_param_group(more)), cls, name, "group 1")
    assert more.keys() == kept.keys()
    assert all(more[key] is kept[key] for key in kept)

    group = optimizer.param_groups[0]
    the_words(refused(lambda: group.__setitem__(name, value)), cls, name, "group 0")
    the_words(refused(lambda: group.update({"note": 1, name: value})), cls, name, "group 0")
    assert "note" not in group
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(("cls", "name", "value"), bad(SAVED))
def test_refused_in_a_state_dict(cls, name, value):
    donor = cls(weights())
    train(donor)
    saved = donor.state_dict()
    saved["param_groups"][0][name] = value
    optimizer = cls(weights(seed=1))
    train(optimizer, seed=1)
    before = snapshot(optimizer)
    the_words(refused(lambda: optimizer.load_state_dict(saved)), cls, name, "group 0")
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("name", "key", "value", "said", "allowed"),
    [
        ("AdamW", "lr", math.nan, "learning rate: nan", "a number in [0, inf)"),
        ("Adam", "betas", (0.9, 1.0), "beta parameter at index 1: 1.0", "a number in [0, 1)"),
        ("SGD", "momentum", "x", "momentum value: 'x'", "a number in [0, inf)"),
        ("SGD", "nesterov", 2, "nesterov value: 2", "True or False"),
        ("SGD", "foreach", 2, "foreach value: 2", "True, False or None"),
    ],
)
def test_what_a_refusal_says(name, key, value, said, allowed):
    error = refused(lambda: ours(name)(weights(), **{key: value}))
    assert str(error) == f"Invalid {said} ({name}: {key} must be {allowed})"


GOOD = [
    ("AdamW", {"lr": 0, "betas": (0, 0.0), "eps": 0, "weight_decay": 0}),
    ("AdamW", {"lr": 1, "betas": [0.5, 0.5], "weight_decay": 3}),
    ("AdamW", {"lr": torch.tensor(1e-3), "betas": (torch.tensor(0.9), torch.tensor([0.99]))}),
    ("AdamW", {"lr": torch.tensor([1e-3]), "eps": torch.tensor(1e-8)}),
    ("AdamW", {"lr": torch.tensor(1e-3, requires_grad=True)}),
    ("SGD", {"lr": 1e30, "momentum": 2.0, "dampening": -1.0, "weight_decay": torch.tensor(0.1)}),
    ("SGD", {"nesterov": True, "momentum": 0.9}),
    ("SGD", {"maximize": True, "foreach": False, "fused": None}),
]


@pytest.mark.parametrize(("name", "values"), GOOD, ids=str)
def test_taken_as_given(name, values):
    optimizer = ours(name)(weights(), **values)
    for key, value in values.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert optimizer.defaults[key] == expected
        assert type(optimizer.param_groups[0][key]) is type(expected)


def test_nesterov_is_judged_by_the_group():
    group = {"params": weights(), "nesterov": True}
    said = "Nesterov momentum requires a momentum and zero dampening (SGD, group 0)"
    assert str(refused(lambda: ours("SGD")([group]))) == said
    assert ours("SGD")([{**group, "momentum": 0.9}]).param_groups
    optimizer = ours("SGD")(weights())
    more = {"params": weights(), "nesterov": True, "momentum": 0.9, "dampening": 0.5}
    assert "(SGD, group 1)" in str(refused(lambda: optimizer.add_param_group(more)))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", [1, np.True_, True])
def test_what_is_true_to_numpy_and_to_c_is_a_flag(value):
    group = stepwell.Adam(weights(), amsgrad=value).param_groups[0]
    assert group["amsgrad"] is True


def test_betas_may_be_an_array():
    assert stepwell.Adam(weights(), betas=np.array([0.8, 0.9])).defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("value", [torch.tensor(1 + 0j), torch.tensor(True)])
def test_a_tensor_rate_must_be_real(value):
    with pytest.raises(TypeError, match="Invalid learning rate"):
        stepwell.SGD(weights(), lr=value)


def test_a_tensor_rate_that_goes_wrong_in_place_is_refused_before_the_step():
    params = weights()
    lr = torch.tensor(0.1)
    optimizer = stepwell.SGD(params, lr=lr)
    fill_grads(params, 0)
    optimizer.step()
    before = [param.clone() for param in params]
    lr.fill_(math.nan)
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_a_schedule_of_torch_may_round_past_zero():
    """torch's chained LinearLR ends a descent to zero a little below it."""
    params = weights()
    optimizer = stepwell.SGD(params, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, 4)
    for step in range(6):
        fill_grads(params, step)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.param_groups[0]["lr"] = -1e-9


@pytest.mark.parametrize("low", [-math.inf, 0.0, -1.0])
@pytest.mark.parametrize("high", [math.inf, 1.0])
@pytest.mark.parametrize("ends", ["", "(", ")", "()"])
def test_the_ends_of_a_range_are_its_first_and_last_float(low, high, ends):
    bounds = Range(low, high, ends)
    first, last = bounds.ends
    largest = sys.float_info.max
    for edge in (low, high, 0.0, largest, -largest):
        for value in (edge, math.nextafter(edge, -math.inf), math.nextafter(edge, math.inf)):
            assert (first <= value <= last) == (value in bounds), value
    assert not first <= math.nan <= last


def test_an_item_that_is_no_number_is_looked_at_too():
    class Paired(stepwell.Optimizer):
        pair: tuple[Decay, int] = (0.5, 2)

        @staticmethod
        def update(param, grad, state, group):
            return param - group.pair[0] * grad

    group = Paired(weights()).param_groups[0]
    for pair in ((0.5, 2.0), (0.5,), (0.5, 0.5)):
        with pytest.raises((TypeError, ValueError), match="pair"):
            group["pair"] = pair
    group["pair"] = (0.25, 3)
    assert group["pair"] == (0.25, 3)


def test_schedules_of_torch_go_the_short_way(monkeypatch):
    """They write into each group at every step: the long way would take longer than they do."""
    optimizer = stepwell.AdamW(weights(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer.step()
    monkeypatch.setattr(Field, "_check_number", None)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] != 0.1


@pytest.mark.parametrize("key", ["_lr", "eps1", "momentum2", "lr_scale", "max_momentum", "lr_"])
def test_a_key_beside_a_hyperparameter_is_foreign(key):
    optimizer = stepwell.SGD([{"params": weights(), key: 5}], momentum=0.9)
    assert optimizer.param_groups[0][key] == 5
