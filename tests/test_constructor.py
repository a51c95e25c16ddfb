"""Does a constructor take what torch's takes, and say what is wrong with the rest?"""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch

import stepwell

from .cases import CLASSES
from .shell_cases import (
    NAMES,
    SignDescent,
    each_name,
    each_twin,
    named_weights,
    ours,
    refused,
    theirs,
    weights,
)

pytestmark = pytest.mark.tiny


@each_name
def test_the_constructor_has_a_name_and_the_signature(name):
    init = ours(name).__init__
    _, *arguments = inspect.signature(init).parameters.values()
    assert arguments == list(inspect.signature(ours(name)).parameters.values())
    assert init.__qualname__ == f"{name}.__init__"
    assert init.__module__ == f"stepwell.optimizers.{name.lower()}"


@each_name
def test_annotations_say_what_a_command_line_may_pass(name):
    parameters = inspect.signature(ours(name)).parameters
    assert parameters["lr"].annotation == float | torch.Tensor
    assert parameters["foreach"].annotation == bool | None
    if name != "SGD":
        number = float | torch.Tensor
        assert parameters["betas"].annotation == tuple[number, number]


@each_twin
def test_defaults_groups_and_repr_are_torchs(twin):
    a, b = twin.ours(weights()), twin.theirs(weights())
    assert a.defaults == b.defaults
    assert {k: type(v) for k, v in a.defaults.items()} == {
        k: type(v) for k, v in b.defaults.items()
    }
    assert a.param_groups[0].keys() == b.param_groups[0].keys()
    assert repr(a) == repr(b)
    grouped = [{"params": weights()}, {"params": weights(), "name": "x"}]
    assert repr(twin.ours(copy.deepcopy(grouped))) == repr(twin.theirs(grouped))
    assert a.state == b.state == {}
    assert a._warned_capturable_if_run_uncaptured is b._warned_capturable_if_run_uncaptured


def test_arguments_by_position():
    optimizer = stepwell.SGD(weights(), 0.5, 0.9, 0.1, 0.2)
    group = optimizer.param_groups[0]
    found = [group[k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov")]
    assert found == [0.5, 0.9, 0.1, 0.2, False]
    assert stepwell.AdamW(params=weights(), lr=0.5).defaults["lr"] == 0.5


@each_name
def test_a_rate_is_no_attribute(name):
    optimizer = ours(name)(weights())
    for hidden in ("lr", "weight_decay", "maximize", "exp_avg", "momentum_buffer"):
        assert not hasattr(optimizer, hidden), hidden


@pytest.mark.parametrize(
    ("arguments", "keywords", "said"),
    [
        (
            (),
            {"speed": 1},
            "unexpected keyword argument 'speed'; it takes params, lr",
        ),
        ((), {"weight_dacay": 1}, "argument 'weight_dacay'; did you mean 'weight_decay'?"),
        ((), {"decoupled_weight_decay": True}, "keyword argument 'decoupled_weight_decay'"),
        ((0.1,), {"lr": 0.1}, "got multiple values for argument 'lr'"),
        (
            (0.1, (0.9, 0.9), 1e-8, 0, False, True),
            {},
            "takes from 2 to 7 positional arguments but 8",
        ),
    ],
)
def test_arguments_that_do_not_exist(arguments, keywords, said):
    error = refused(lambda: stepwell.AdamW(weights(), *arguments, **keywords))
    assert type(error) is TypeError
    assert str(error).startswith("AdamW.__init__() ")
    assert said in str(error)


def test_params_must_be_given():
    error = refused(lambda: stepwell.AdamW(lr=1.0))
    assert str(error) == "AdamW.__init__() missing 1 required positional argument: 'params'"


def test_sgd_has_no_capturable():
    assert type(refused(lambda: stepwell.SGD(weights(), capturable=False))) is TypeError


WAYS = {
    "list": lambda params: params,
    "generator": lambda params: (p for p in params),
    "values": lambda params: dict(enumerate(params)).values(),
    "ParameterList": torch.nn.ParameterList,
    "dicts": lambda params: [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}],
    "generator in a dict": lambda params: [{"params": (p for p in params)}],
    "one tensor in a dict": lambda params: [{"params": params[0]}],
    "tuple of dicts": lambda params: ({"params": params},),
    "names": lambda params: [(str(i), p) for i, p in enumerate(params)],
    "empty group": lambda params: [{"params": []}, {"params": params}],
    "frozen": lambda params: [p.requires_grad_(False) for p in params],
}


@pytest.mark.parametrize("way", WAYS)
@each_name
def test_ways_to_pass_parameters(name, way):
    params = weights()
    a, b = ours(name)(WAYS[way](params)), theirs(name)(WAYS[way](params))
    assert len(a.param_groups) == len(b.param_groups)
    for group, twin in zip(a.param_groups, b.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in twin["params"]]
        assert group.get("param_names") == twin.get("param_names")
        assert group["lr"] == twin["lr"]


def non_leaf():
    return [weights()[0] * 2]


SHARED = weights()
REFUSED = {
    "a tensor": (lambda: torch.ones(2), "put it in a list"),
    "nothing": (list, "can be used only once"),
    "an int among tensors": (lambda: [*weights(), 3], "parameter 3"),
    "a group alone": (lambda: {"params": weights()}, "put a group in a list"),
    "a non-leaf": (non_leaf, "it was computed from others"),
    "a non-leaf in the second group": (
        lambda: [{"params": weights()}, {"params": non_leaf()}],
        "group 1, parameter 0",
    ),
    "a dict after tensors": (lambda: [*weights(), {"params": weights()}], "parameter 3"),
    "tensors after a dict": (lambda: [{"params": weights()}, *weights()], "group 1"),
    "a set in a dict": (lambda: [{"params": set(weights())}], "group 0"),
    "no params": (lambda: [{"lr": 0.1}], "group 0: a group needs this key"),
    "twice": (lambda: [{"params": SHARED}, {"params": SHARED[1:2]}], "parameter 0 is in group 0"),
    "half the names": (lambda: [*named_weights(), weights()[0]], "3 of 4 are named"),
    "names in one group": (
        lambda: [{"params": named_weights("a b")}, {"params": weights()}],
        "group 1",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@each_name
def test_refused_parameters_begin_with_torchs_words(name, what):
    make, remedy = REFUSED[what]
    error, twin = refused(lambda: ours(name)(make())), refused(lambda: theirs(name)(make()))
    assert isinstance(error, type(twin))
    assert error.args[0].startswith(twin.args[0])
    assert name in error.args[0]
    assert remedy in error.args[0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (3, "should be an iterable of Tensors or dicts, but got int"),
        (None, "should be an iterable of Tensors or dicts, but got NoneType"),
        (torch.nn.Linear(2, 2), "pass model.parameters()"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), "pass its .parameters()"),
        ([{"params": 3}], "got int"),
        ([{"params": torch.nn.Linear(2, 2)}], "got torch.nn.modules.linear.Linear"),
        ([("name", *SHARED[:2])], "must be a (name, Tensor)"),
        ([(0, SHARED[0])], "must be a (name, Tensor)"),
        ([{"params": SHARED[:2], "param_names": ["only one"]}], "1 param_names for 2 params"),
    ],
)
def test_refused_where_torch_is_silent_or_unclear(params, words):
    error = refused(lambda: stepwell.SGD(params))
    assert isinstance(error, (TypeError, ValueError))
    assert words in str(error)
    assert "SGD" in str(error)


def test_non_leaf_is_taken_when_differentiable():
    assert stepwell.Adam(non_leaf(), differentiable=True).param_groups


@each_name
def test_duplicates_warn_as_torch_does(name):
    params = weights()[:1] * 2
    with pytest.warns(UserWarning, match="duplicate parameters; in future") as caught:
        ours(name)(params)
    with pytest.warns(UserWarning, match="duplicate") as torchs:
        theirs(name)(params)
    assert str(caught[0].message).startswith(str(torchs[0].message))


def test_tied_parameters_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = stepwell.AdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "flags", [{"fused": True, "foreach": True}, {"fused": True, "differentiable": True}]
)
def test_flags_that_exclude_each_other(name, flags):
    error, twin = (
        refused(lambda make=make: make(weights(), **flags)) for make in (ours(name), theirs(name))
    )
    assert type(error) is type(twin) is RuntimeError
    assert str(error).startswith(str(twin))


def test_flags_that_exclude_each_other_in_a_group():
    error = refused(lambda: stepwell.AdamW([{"params": weights(), "foreach": True}], fused=True))
    assert "`fused` and `foreach` cannot be `True` together. (AdamW, group 0)" in str(error)


def test_a_rule_of_the_users_own():
    names = list(inspect.signature(SignDescent).parameters)
    flags = ["maximize", "foreach", "capturable", "differentiable", "fused"]
    assert names == ["params", "lr", "momentum", *flags]
    optimizer = SignDescent(weights(), 0.5, maximize=True)
    assert optimizer.defaults["lr"] == 0.5
    assert "weight_decay" not in optimizer.param_groups[0]
    assert refused(lambda: SignDescent(weights(), lr=-1)).args[0] == (
        "Invalid learning rate: -1 (SignDescent: lr must be a number in [0, inf))"
    )


@pytest.mark.parametrize(
    ("name", "params", "options"),
    [
        ("SGD", None, {"nesterov": True}),
        ("SGD", [], {"momentum": 0.9, "dampening": 0.1, "nesterov": True}),
        ("SGD", [{"params": SHARED[:1], "momentum": 0.9}], {"nesterov": True}),
        ("Rprop", None, {"etas": (1.0, 0.5)}),
        ("Adam", None, {"betas": (1.0, 0.9)}),
        ("LBFGS", [{"params": SHARED[:1]}, {"params": SHARED[:1]}], {}),
    ],
)
def test_the_first_of_two_mistakes_is_the_one_that_torch_names(name, params, options):
    one, other = (refused(lambda c=c: c(params, **options)) for c in (theirs(name), ours(name)))
    assert type(one) is type(other)
    assert str(other).startswith(str(one))


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_hook_puts_into_the_state_is_saved(name):
    """Torch's own tests keep a number there; it belongs to no parameter."""
    optimizer = ours(name)([torch.nn.Parameter(torch.ones(2, 2))])
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(mark=1))
    assert optimizer.state_dict()["state"]["mark"] == 1
