"""Is a rule that a user writes, or composes, as good as one of the package?"""

from __future__ import annotations

import inspect
import re
from dataclasses import KW_ONLY
from typing import Any, ClassVar, Literal

import pytest
import torch

import stepwell
from stepwell.language import (
    Average,
    ClipNorm,
    Decay,
    NonNegative,
    Scale,
    Transform,
    Unscale,
    fixed,
    unset,
    zeros,
)

from .shell_cases import SignDescent, fill_grads, refused, train, weights

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret


def step_of(optimizer, seed=0):
    """The parameters before and after one step, and its gradients."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in params]
    fill_grads(params, seed)
    grads = [p.grad.clone() for p in params]
    optimizer.step()
    return before, [p.detach() for p in params], grads


def test_a_rule_trains_and_keeps_its_state():
    params = weights()
    optimizer = SignDescent(params, lr=0.5)
    before, after, grads = step_of(optimizer)
    for old, new, grad, param in zip(before, after, grads, params, strict=True):
        torch.testing.assert_close(new, old - 0.5 * grad.sign())
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], 0.1 * grad)
        assert set(optimizer.state[param]) == {"exp_avg"}


@pytest.mark.parametrize("flags", [{"maximize": True}, {"foreach": True}, {"fused": True}])
def test_shared_flags(flags):
    optimizer = SignDescent(weights(), lr=0.5, **flags)
    before, after, grads = step_of(optimizer)
    sign = 1 if "maximize" in flags else -1
    for old, new, grad in zip(before, after, grads, strict=True):
        torch.testing.assert_close(new, old + sign * 0.5 * grad.sign())


def local_rule():
    class Local(stepwell.Optimizer):
        lr: NonNegative = 0.5
        power: Literal[1, 2] = 1

        last = unset()

        @staticmethod
        def update(param, grad, state, group):
            last, state.last = state.last, grad
            moved = grad if last is None else grad + last
            return param - group.lr * (moved if group.power == 1 else moved * moved)

    return Local


def test_a_rule_defined_in_a_function():
    before, after, grads = step_of(local_rule()(weights(), power=2))
    for old, new, grad in zip(before, after, grads, strict=True):
        torch.testing.assert_close(new, old - 0.5 * grad * grad)


class Listed(stepwell.Optimizer):
    """Lists the flags that it wants itself."""

    lr: NonNegative = 0.5
    foreach: bool | None = None
    _: KW_ONLY
    differentiable: bool = False
    kind = fixed("plain")

    registry: ClassVar[list] = []

    @staticmethod
    def update(param, grad, state, group):
        return param - group.lr * grad


def test_flags_of_its_own():
    parameters = inspect.signature(Listed).parameters
    assert list(parameters) == ["params", "lr", "foreach", "differentiable"]
    assert parameters["foreach"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameters["differentiable"].kind is inspect.Parameter.KEYWORD_ONLY
    optimizer = Listed(weights(), 0.25, True)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        "lr": 0.25,
        "foreach": True,
        "differentiable": False,
        "kind": "plain",
    }
    assert Listed.registry == []
    train(optimizer)


class Slower(stepwell.AdamW):
    """A subclass with a hyperparameter more and a formula of its own."""

    slowness: NonNegative = 2.0

    @staticmethod
    def update(param, grad, state, group):
        new = stepwell.AdamW.update(param, grad, state, group)
        return param + (new - param) / group.slowness


def test_a_subclass_adds_to_a_rule():
    names = list(inspect.signature(Slower).parameters)
    own = ["params", "lr", "betas", "eps", "weight_decay", "amsgrad", "slowness"]
    assert names == [*own, "maximize", "foreach", "capturable", "differentiable", "fused"]
    slow, fast = Slower(weights(), lr=0.1, slowness=4.0), stepwell.AdamW(weights(), lr=0.1)
    before, after, _ = step_of(slow)
    _, whole, _ = step_of(fast)
    for old, new, far in zip(before, after, whole, strict=True):
        torch.testing.assert_close(new - old, (far - old) / 4)
    assert "Slower" in str(refused(lambda: Slower(weights(), slowness=-1)))


class Preset(stepwell.AdamW):
    """A subclass with a constructor, and annotations, of its own, as in torch."""

    rate: float

    def __init__(self, params, rate):
        self.rate = rate
        super().__init__(params, lr=rate / 10)


def test_a_subclass_with_its_own_constructor():
    optimizer = Preset(weights(), rate=5.0)
    assert list(inspect.signature(Preset).parameters) == ["params", "rate"]
    assert (optimizer.rate, optimizer.param_groups[0]["lr"]) == (5.0, 0.5)
    assert "Preset: lr" in str(refused(lambda: Preset(weights(), rate=-1.0)))
    train(optimizer)


class Started(stepwell.Optimizer):
    """A rule with a constructor of its own."""

    lr: NonNegative = 1.0

    def __init__(self, params):
        super().__init__(params, lr=0.25, maximize=True)

    @staticmethod
    def update(param, grad, state, group):
        return param - group.lr * grad


def test_a_rule_with_its_own_constructor():
    assert list(inspect.signature(Started).parameters) == ["params"]
    before, after, grads = step_of(Started(weights()))
    for old, new, grad in zip(before, after, grads, strict=True):
        torch.testing.assert_close(new, old + 0.25 * grad)


class Plain(stepwell.SGD):
    pass


def test_a_subclass_with_nothing_of_its_own():
    assert inspect.signature(Plain) == inspect.signature(stepwell.SGD)
    assert repr(Plain(weights())).startswith("Plain (")
    assert "(Plain: lr" in str(refused(lambda: Plain(weights(), lr=-1)))
    assert Plain.formula is stepwell.SGD.formula, "one formula, so one kernel"


WRONG = {
    "a name of the shell": ({"state": 1.0}, "state: the shell uses this name"),
    "a method's name": ({"zero_grad": 1.0}, "zero_grad: the shell uses this name"),
    "a rate without a range": ({"lr": None}, "lr: a hyperparameter"),
    "a default out of range": ({"lr": -1.0}, "Invalid learning rate: -1.0 (Wrong, default"),
}


@pytest.mark.parametrize("what", WRONG)
def test_declarations_that_cannot_be(what):
    values, said = WRONG[what]
    kinds = {name: NonNegative if value is not None else str for name, value in values.items()}
    body = {
        "__module__": __name__,
        "__annotations__": kinds,
        **values,
        "update": staticmethod(lambda param, grad, state, group: param),
    }
    assert said in str(refused(lambda: type("Wrong", (stepwell.Optimizer,), body)))


@pytest.mark.parametrize("name", ["step", "grad", "params"])
def test_state_that_cannot_be(name):
    body = {
        "__module__": __name__,
        name: zeros(),
        "update": staticmethod(lambda param, grad, state, group: param),
    }
    error = refused(lambda: type("Wrong", (stepwell.Optimizer,), body))
    assert f"Wrong.{name}: the shell uses this name" in str(error)


def test_an_update_with_other_arguments():
    def define():
        class Wrong(stepwell.Optimizer):
            def update(self, param, grad, state, group):
                return param

    assert "must be a static method of (param, grad, state, group)" in str(refused(define))


def test_a_hyperparameter_needs_a_default():
    def define():
        class Wrong(stepwell.Optimizer):
            lr: NonNegative

            @staticmethod
            def update(param, grad, state, group):
                return param

    assert "Wrong.lr: a hyperparameter needs a default" in str(refused(define))


# Composition


def test_compose_gives_one_class_with_more_arguments():
    cls = stepwell.compose(stepwell.AdamW, ClipNorm)
    assert cls is stepwell.compose(stepwell.AdamW, ClipNorm)
    assert stepwell.compose(stepwell.AdamW) is stepwell.AdamW
    parameters = inspect.signature(cls).parameters
    own = inspect.signature(stepwell.AdamW).parameters
    assert list(parameters) == [*own, "max_norm"]
    assert parameters["max_norm"].kind is inspect.Parameter.KEYWORD_ONLY
    optimizer = cls(weights(), 0.1, max_norm=0.5)
    assert isinstance(optimizer, stepwell.AdamW)
    assert optimizer.param_groups[0]["max_norm"] == 0.5
    assert repr(optimizer).startswith("AdamW+ClipNorm (\n")
    error = refused(lambda: cls(weights(), max_norm=0))
    assert str(error).startswith("Invalid max_norm value: 0 (AdamW+ClipNorm: max_norm must be")


def test_compose_is_not_seen_by_the_rule_itself():
    stepwell.compose(stepwell.AdamW, ClipNorm)
    assert "max_norm" not in inspect.signature(stepwell.AdamW).parameters
    assert "max_norm" not in stepwell.AdamW(weights()).param_groups[0]


def test_composed_steps():
    cls = stepwell.compose(stepwell.SGD, Scale, Average)
    params = weights()
    optimizer = cls(params, lr=1.0, grad_factor=0.5, average_decay=0.75)
    before, after, grads = step_of(optimizer)
    for old, new, grad, param in zip(before, after, grads, params, strict=True):
        torch.testing.assert_close(new, old - 0.5 * grad)
        torch.testing.assert_close(optimizer.state[param]["average"], new)
    before, after, _ = step_of(optimizer)
    for old, new, param in zip(before, after, params, strict=True):
        average = optimizer.state[param]["average"]
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new)


class Shift(Transform):
    """A transform of a user's own."""

    shift: NonNegative = 1.0

    @staticmethod
    def before(param, grad, state, group):
        return grad + group.shift


class Double(Transform):
    double: Decay = 0.0

    @staticmethod
    def before(param, grad, state, group):
        return 2 * grad


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: stepwell.compose(stepwell.SGD, Shift, Double), lambda g: 2 * (g + 1)),
        (lambda: stepwell.compose(stepwell.SGD, Double, Shift), lambda g: 2 * g + 1),
        (
            lambda: stepwell.compose(stepwell.compose(stepwell.SGD, Double), Shift),
            lambda g: 2 * (g + 1),
        ),
    ],
)
def test_the_first_transform_is_the_outermost(make, expected):
    before, after, grads = step_of(make()(weights(), lr=1.0))
    for old, new, grad in zip(before, after, grads, strict=True):
        torch.testing.assert_close(new, old - expected(grad))


class WithTransforms(stepwell.SGD):
    """Composition by declaration."""

    transforms = (Shift,)


def test_a_class_may_list_its_transforms():
    assert "shift" in inspect.signature(WithTransforms).parameters
    before, after, grads = step_of(WithTransforms(weights(), lr=1.0, shift=2.0))
    for old, new, grad in zip(before, after, grads, strict=True):
        torch.testing.assert_close(new, old - (grad + 2))


class SecondRate(Transform):
    lr: NonNegative = 1.0


@pytest.mark.parametrize("transform", [Unscale, SecondRate])
def test_what_cannot_be_composed(transform):
    error = refused(lambda: stepwell.compose(stepwell.SGD, transform))
    assert type(error) is TypeError
    assert "already" in str(error)


@pytest.mark.parametrize("arguments", [{}, {"lr": 0.1}])
def test_a_rule_without_its_formula_says_so(arguments: dict[str, float]) -> None:
    class Misspelt(stepwell.Optimizer):
        lr: NonNegative = 1e-3

        @staticmethod
        def udpate(param: Any, grad: Any, state: Any, group: Any) -> Any:
            return param - group.lr * grad

    words = "has no update(param, grad, state, group), which a rule must define; did you mean"
    with pytest.raises(TypeError, match=re.escape(words) + " 'update' by 'udpate'"):
        Misspelt([torch.nn.Parameter(torch.ones(1))], **arguments)
    with pytest.raises(TypeError, match=r"missing 1 required .*: 'defaults' \(Optimizer has no"):
        stepwell.Optimizer([torch.nn.Parameter(torch.ones(1))])
