"""Do parameter groups hold what they are given, refuse what looks misspelt, and stay whole?"""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch

import stepwell

from .shell_cases import (
    assert_same,
    each_name,
    fill_grads,
    named_weights,
    ours,
    refused,
    snapshot,
    theirs,
    train,
    weights,
)

MISSPELT = {
    "weight_dacay": "weight_decay",
    "weightdecay": "weight_decay",
    "weight-decay": "weight_decay",
    "LR": "lr",
    "lrr": "lr",
    "llr": "lr",
    "learning_rate": "lr",
    "epss": "eps",
    "epsilon": "eps",
    "beta": "betas",
    "amsgard": "amsgrad",
    "maximise": "maximize",
    "for_each": "foreach",
    "param_name": "param_names",
}
FOREIGN = (
    *("name", "names", "lr_scale", "lr_mult", "initial_lr", "max_lr", "min_lr", "base_momentum"),
    *("max_momentum", "swa_lr", "layer", "wd", "decay", "tag", "momentum", "is_bias", "no_decay"),
)


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys_are_refused_everywhere(key):
    said = f"key '{key}' is no hyperparameter; did you mean '{MISSPELT[key]}'?"
    error = refused(lambda: stepwell.AdamW([{"params": weights(), key: 0.1}]))
    assert type(error) is ValueError
    assert str(error).startswith(f"AdamW, group 0: {said}")
    optimizer = stepwell.AdamW(weights())
    before = snapshot(optimizer)
    group = optimizer.param_groups[0]
    more = {"params": weights(), key: 0.1}
    assert said in str(refused(lambda: optimizer.add_param_group(more)))
    assert said in str(refused(lambda: group.__setitem__(key, 0.1)))
    assert said in str(refused(lambda: group.setdefault(key, 0.1)))
    assert said in str(refused(lambda: group.update({key: 0.1})))
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = 0.1
    assert said in str(refused(lambda: optimizer.load_state_dict(saved)))
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("key", FOREIGN)
def test_foreign_keys_are_kept(key):
    optimizer = stepwell.AdamW([{"params": weights(), key: "x"}])
    group = optimizer.param_groups[0]
    assert group[key] == "x"
    group[key] = "y"
    other = stepwell.AdamW(weights())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0][key] == "y"


def test_a_key_that_is_no_string_is_foreign():
    optimizer = stepwell.AdamW([{"params": weights(), 7: "x"}])
    assert optimizer.param_groups[0][7] == "x"


@each_name
def test_the_given_dict_is_filled_as_by_torch(name):
    a, b = ({"params": (p for p in weights()), "lr": 0.5, "note": 1} for _ in range(2))
    ours(name)([a])
    theirs(name)([b])
    assert a.keys() == b.keys()
    assert isinstance(a["params"], list)
    assert {k: v for k, v in a.items() if k != "params"} == {
        k: v for k, v in b.items() if k != "params"
    }


@each_name
def test_a_failed_constructor_leaves_the_dicts_as_they_were(name):
    given = [{"params": weights()}, {"params": weights(), "lr": -1.0}]
    kept = [dict(group) for group in given]
    refused(lambda: ours(name)(given))
    assert all(a.keys() == b.keys() for a, b in zip(given, kept, strict=True))


@each_name
def test_add_param_group_in_the_middle_of_training(name):
    made = []
    for library in (ours, theirs):
        params = weights()
        optimizer = library(name)(params[:1], lr=0.1)
        train(optimizer)
        added = {"params": params[1:], "lr": 0.01, "name": "head"}
        optimizer.add_param_group(added)
        assert added["weight_decay"] == optimizer.defaults["weight_decay"]
        train(optimizer, seed=1)
        made.append((optimizer, params))
    (a, found), (b, expected) = made
    assert [g["lr"] for g in a.param_groups] == [0.1, 0.01]
    assert repr(a).partition("Backend")[0] + ")" == repr(b)
    torch.testing.assert_close(found, expected)


NEW = weights(seed=9)
BAD_GROUPS = {
    "no dict": lambda known: weights(),
    "no params": lambda known: {"lr": 0.1},
    "a known parameter": lambda known: {"params": [*NEW, known]},
    "a set": lambda known: {"params": set(NEW)},
    "an int": lambda known: {"params": [*NEW, 3]},
    "a non-leaf": lambda known: {"params": [NEW[0] * 2]},
    "names": lambda known: {"params": named_weights()},
    "half the names": lambda known: {"params": [*named_weights(), *NEW]},
}


@pytest.mark.parametrize("what", BAD_GROUPS)
@each_name
def test_a_refused_group_changes_nothing(name, what):
    params = weights()
    optimizer = ours(name)(params)
    train(optimizer)
    group = BAD_GROUPS[what](params[0])
    kept = dict(group) if isinstance(group, dict) else None
    before = snapshot(optimizer)
    error = refused(lambda: optimizer.add_param_group(group))
    assert name in error.args[0]
    assert "group 1" in error.args[0]
    assert_same(snapshot(optimizer), before)
    if kept is not None:
        assert group.keys() == kept.keys()
        assert all(group[key] is kept[key] for key in kept)
    twin = refused(lambda: theirs(name)(params).add_param_group(BAD_GROUPS[what](params[0])))
    assert isinstance(error, type(twin))
    assert error.args[0].startswith(twin.args[0])


def test_duplicates_in_an_added_group_warn():
    optimizer = stepwell.SGD(weights())
    more = {"params": [NEW[0], NEW[0]]}
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer.add_param_group(more)
    assert len(optimizer.param_groups) == 2


def test_names_need_names():
    optimizer = stepwell.SGD(named_weights("a b"))
    optimizer.add_param_group({"params": named_weights("c")})
    assert [g["param_names"] for g in optimizer.param_groups] == [["a", "b"], ["c"]]
    error = refused(lambda: optimizer.add_param_group({"params": NEW}))
    assert "cannot add param group without names" in str(error)


def test_a_written_rate_counts_at_the_next_step():
    params = weights([(1,)])
    optimizer = stepwell.SGD(params, lr=1.0)
    for rate in (1.0, 0.25, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        before = params[0].item()
        params[0].grad = torch.ones(1)
        optimizer.step()
        assert params[0].item() == pytest.approx(before - rate)


def test_defaults_changed_by_hand_are_checked_when_used():
    optimizer = stepwell.SGD(weights())
    optimizer.defaults["lr"] = 0.5
    optimizer.add_param_group({"params": weights()})
    assert optimizer.param_groups[1]["lr"] == 0.5
    optimizer.defaults["lr"] = -1
    error = refused(lambda: optimizer.add_param_group({"params": weights()}))
    assert "Invalid learning rate: -1 (SGD, group 2" in str(error)


def test_a_group_is_a_dict_and_its_copy_a_plain_one():
    group = stepwell.SGD(weights()).param_groups[0]
    assert isinstance(group, dict)
    group |= {"note": 1}
    assert group["note"] == 1
    assert "learning rate" in str(refused(lambda: group.__ior__({"lr": -1})))
    assert group.setdefault("lr", 5.0) == 1e-3
    for twin in (copy.copy(group), copy.deepcopy(group)):
        assert type(twin) is dict
        assert twin.keys() == group.keys()
    # which torch.load takes with weights_only=True
    assert type(pickle.loads(pickle.dumps(group))) is OrderedDict


def test_parameters_may_be_replaced():
    params = weights()
    optimizer = stepwell.SGD(params, lr=1.0)
    group = optimizer.param_groups[0]
    train(optimizer)
    group["params"] = (p for p in params[:1])
    assert group["params"] == params[:1]
    before = params[1].detach().clone()
    fill_grads(params, 5)
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert "ordered collections" in str(refused(lambda: group.__setitem__("params", set(params))))
    assert "got int (SGD, group 0" in str(refused(lambda: group.update(params=3)))
    assert group["params"] == params[:1]


def test_thousands_of_groups():
    params = weights([(2,)] * 2000)
    groups = [{"params": [p], "lr": 1.0 + i} for i, p in enumerate(params)]
    optimizer = stepwell.SGD(groups)
    before = [p.detach().clone() for p in params]
    fill_grads(params, 0)
    optimizer.step()
    for i, (param, old) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(param.detach(), old - (1.0 + i) * param.grad)


def test_the_fixed_hyperparameter_of_adamw():
    optimizer = stepwell.AdamW(weights())
    group = optimizer.param_groups[0]
    assert group["decoupled_weight_decay"] is True
    group["decoupled_weight_decay"] = True
    error = refused(lambda: group.__setitem__("decoupled_weight_decay", False))
    assert "decoupled_weight_decay must be one of True" in str(error)


@pytest.mark.parametrize("key", ["lr", "betas", "maximize"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_key_that_was_taken_out_of_a_group_is_missed_by_the_step(key, steps_before):
    params = weights()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = (
        lib.AdamW([{"params": some[:1]}, {"params": some[1:], "lr": 0.1}])
        for lib, some in ((stepwell, params), (torch.optim, twins))
    )
    for seed in range(steps_before):
        fill_grads(params, seed)
        ours.step()
    before = [p.detach().clone() for p in params]
    for p in (*params, *twins):
        p.grad = torch.ones_like(p)
    value = ours.param_groups[1].pop(key)
    del theirs.param_groups[1][key]
    error, torchs = refused(ours.step), refused(theirs.step)
    assert isinstance(error, KeyError)
    assert (
        str(error)
        == f"{torchs} (AdamW, group 1: the step needs this key, which was taken out of the group)"
    )
    assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    ours.param_groups[1][key] = value
    ours.step()
    assert not torch.equal(params[-1].detach(), before[-1])
