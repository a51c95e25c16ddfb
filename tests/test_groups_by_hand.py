"""Are groups that are put into `param_groups` by hand checked before a step moves anything?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepwell

from .shell_cases import assert_same, fill_grads, refused, snapshot, weights

NAN = float("nan")
Change = Callable[[Any, dict[str, Any]], None]


def _assign(optimizer: Any, group: dict[str, Any]) -> None:
    optimizer.param_groups = [group]


def _append(optimizer: Any, group: dict[str, Any]) -> None:
    optimizer.param_groups.append({**group, "params": weights()})


def _insert(optimizer: Any, group: dict[str, Any]) -> None:
    optimizer.param_groups.insert(0, {**group, "params": weights()})


def _extend(optimizer: Any, group: dict[str, Any]) -> None:
    optimizer.param_groups += [{**group, "params": weights()}]


def _item(optimizer: Any, group: dict[str, Any]) -> None:
    optimizer.param_groups[0] = group


def _slice(optimizer: Any, group: dict[str, Any]) -> None:
    optimizer.param_groups[:] = [group]


def _later(optimizer: Any, group: dict[str, Any]) -> None:
    """A plain dict that is right when it comes, and has had a step."""
    optimizer.param_groups = [dict(optimizer.param_groups[0])]
    optimizer.step()
    optimizer.param_groups[0].clear()
    optimizer.param_groups[0].update(group)


WAYS: list[Change] = [_assign, _append, _insert, _extend, _item, _slice, _later]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"lr": NAN}, "Invalid learning rate: nan (AdamW, group {index}"),
    "of a tuple": ({"betas": (0.9, 2.0)}, "Invalid beta parameter at index 1: 2.0 (AdamW, group"),
    "misspelt": ({"weight_decy": 0.5}, "did you mean 'weight_decay'?"),
    "missing": ({"eps": None}, "eps"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("change", WAYS)
def test_a_wrong_group_is_refused_and_nothing_moves(change: Change, wrong: str) -> None:
    params = weights()
    optimizer = stepwell.AdamW(params, lr=0.1)
    fill_grads(params, 0)
    optimizer.step()
    more, words = WRONG[wrong]
    group = {**optimizer.param_groups[0], **more}
    if wrong == "missing":
        del group["eps"]
    change(optimizer, group)
    before = snapshot(optimizer)[1:], [param.detach().clone() for param in params]
    error = refused(optimizer.step)
    assert isinstance(error, (ValueError, KeyError))
    index = 1 if change in (_append, _extend) else 0
    assert words.format(index=index) in str(error)
    assert f"group {index}" in str(error)
    assert_same((snapshot(optimizer)[1:], [param.detach() for param in params]), before)


@pytest.mark.parametrize(
    ("groups", "kind", "words"),
    [
        ([3], TypeError, "param_group must be a dict, but got <class 'int'> (AdamW, group 0)"),
        ([{"lr": 0.1}], KeyError, "params (AdamW, group 0: a group needs this key, it has lr)"),
        (5, TypeError, "AdamW: param_groups must be a list of dicts, got int"),
        (
            [{"params": ["w"]}],
            TypeError,
            "optimizer can only optimize Tensors, but one of the params is str (AdamW, group 0",
        ),
    ],
)
def test_what_is_no_group(groups: Any, kind: type[Exception], words: str) -> None:
    optimizer = stepwell.AdamW(weights(), lr=0.1)
    optimizer.param_groups = groups
    error = refused(optimizer.step)
    assert isinstance(error, kind)
    # a KeyError, too, prints its words without quotes
    assert str(error).startswith(words)


def test_a_dict_that_others_hold_goes_on_being_the_group() -> None:
    """As SAM's wrappers do it: the schedule writes into the dicts of another optimizer."""
    params = weights()
    optimizer, twin = stepwell.SGD(params, lr=0.1), torch.optim.SGD(weights(), lr=0.1)
    for each in (optimizer, twin):
        groups = [dict(each.param_groups[0])]
        each.param_groups = groups
        own = each.param_groups[0]["params"]
        fill_grads(own, 0)
        each.step()
        groups[0]["lr"] = 0.5
        each.step()
        assert each.param_groups is groups
    torch.testing.assert_close(
        [p.detach() for p in params], [p.detach() for p in twin.param_groups[0]["params"]]
    )


def test_values_of_another_kind_that_mean_the_same() -> None:
    """A group that was read from JSON has lists for tuples."""
    params = weights()
    optimizer = stepwell.AdamW(params, lr=0.1)
    optimizer.param_groups = [{**optimizer.param_groups[0], "betas": [0.5, 0.9]}]
    optimizer.param_groups[0]["params"] = tuple(params)
    twin = stepwell.AdamW(weights(), lr=0.1, betas=(0.5, 0.9))
    for each in (optimizer, twin):
        fill_grads(each.param_groups[0]["params"], 0)
        each.step()
        each.step()
    torch.testing.assert_close(
        [p.detach() for p in params], [p.detach() for p in twin.param_groups[0]["params"]]
    )


@pytest.mark.parametrize("plain", [False, True])
def test_a_key_that_torch_lacks(plain: bool) -> None:
    """It is read where it is not a key, and written and taken back at any time."""
    params = weights()
    optimizer = stepwell.RMSprop(params, lr=0.1)
    if plain:
        optimizer.param_groups = [dict(optimizer.param_groups[0])]
    (group,) = optimizer.param_groups
    fill_grads(params, 0)
    optimizer.step()
    assert "fused" not in group
    backends = []
    for value in (False, None, True):
        group["fused"] = value
        optimizer.step()
        backends.append("Backend: eager" in repr(optimizer))
        assert group.get("fused") is value
        assert ("fused" in group) is (value is not None or plain)
    assert backends == [True, False, False]
    assert refused(lambda: (group.update(fused=3), optimizer.step())).args[0].startswith("Invalid")


def test_some_groups_have_a_key_that_torch_lacks() -> None:
    one, other = weights(), weights()
    optimizer = stepwell.RMSprop([{"params": one}, {"params": other, "fused": False}], lr=0.1)
    assert [group["fused"] for group in optimizer.param_groups] == [None, False]
    twin = torch.optim.RMSprop([{"params": weights()}, {"params": weights()}], lr=0.1)
    for each in (optimizer, twin):
        for group in each.param_groups:
            fill_grads(group["params"], 0)
        each.step()
        each.step()
    found, expected = (
        [p.detach() for group in each.param_groups for p in group["params"]]
        for each in (optimizer, twin)
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(KeyError):
        optimizer.param_groups[0]["no_such_key"]


# What else is put into an optimizer by hand


def test_a_plain_dict_of_state() -> None:
    """`optimizer.state = {}` is how some begin anew."""
    params = weights()
    optimizer = stepwell.AdamW(params, lr=0.1)
    fill_grads(params, 0)
    optimizer.step()
    optimizer.state = {}
    optimizer.step()
    assert [state["step"] for state in optimizer.state.values()] == [1] * len(params)
    optimizer.state = {}
    optimizer.init_state()
    assert [state["step"] for state in optimizer.state.values()] == [0] * len(params)


def _with_state(value: Any) -> Any:
    params = weights()
    optimizer = stepwell.AdamW(params, lr=0.1)
    fill_grads(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["step"] = value
    return optimizer


def _saved(**changes: Any) -> dict[str, Any]:
    optimizer = stepwell.AdamW(weights(), lr=0.1)
    optimizer.init_state()
    saved: dict[str, Any] = optimizer.state_dict()
    saved["state"][0] = changes.pop("state", saved["state"][0])
    saved["param_groups"][0].update(changes)
    return saved


def _load(saved: dict[str, Any]) -> None:
    stepwell.AdamW(weights(), lr=0.1).load_state_dict(saved)


def _assign_state(value: Any) -> None:
    optimizer = stepwell.AdamW(weights(), lr=0.1)
    optimizer.state = value
    optimizer.step()


SAID: dict[str, tuple[Callable[[], Any], str]] = {
    "closure": (
        lambda: stepwell.AdamW(weights()).step(3),  # type: ignore[call-overload]
        "AdamW.step: closure must be a function that computes the loss and the gradients, got int",
    ),
    "hook": (
        lambda: stepwell.AdamW(weights()).register_step_pre_hook(3),  # type: ignore[arg-type]
        "AdamW.register_step_pre_hook: hook must be a function, got 3",
    ),
    "names": (
        lambda: stepwell.AdamW([{"params": weights(), "param_names": 3}]),
        "AdamW, group 0: param_names must be a list of str, got 3",
    ),
    "state": (lambda: _assign_state(None), "AdamW: state must be a dict with an entry for each"),
    "count": (
        lambda: _with_state("many").step(),
        "AdamW: state['step'] of group 0, parameter 0 must be a number, got 'many'",
    ),
    "entry": (lambda: _load(_saved(state=None)), "AdamW: the loaded state dict does not fit"),
    "meta": (
        lambda: _load(_saved(state={k: _meta(k) for k in ("step", "exp_avg", "exp_avg_sq")})),
        "AdamW: the state dict has a tensor of shape",
    ),
}


def _meta(name: str) -> torch.Tensor:
    return torch.ones(()) if name == "step" else weights()[0].detach().to("meta")


@pytest.mark.parametrize("what", SAID)
def test_what_is_said(what: str) -> None:
    call, words = SAID[what]
    assert str(refused(call)).startswith(words)


def test_names_of_another_kind_in_a_state_dict_are_no_names() -> None:
    _load(_saved(param_names=3))


def test_keys_of_any_kind_are_printed() -> None:
    optimizer = stepwell.SGD(weights())
    optimizer.param_groups[0][5] = "five"  # type: ignore[index]
    assert "    5: five" in repr(optimizer)
