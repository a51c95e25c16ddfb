"""What the tests of the shell share: pairs of ours and torch's, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import stepwell
from stepwell.language import Decay, NonNegative, lerp, sign, zeros


@dataclass(frozen=True)
class Twin:
    """A rule by the name that it has in both libraries, with hyperparameters."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> Callable[..., Any]:
        return lambda params, **more: getattr(stepwell, self.name)(params, **self.options, **more)

    @property
    def theirs(self) -> Callable[..., Any]:
        return lambda params, **more: getattr(torch.optim, self.name)(
            params, **self.options, **more
        )

    def __str__(self) -> str:
        return self.name + "".join(f"-{key}" for key in self.options)


NAMES = ("SGD", "Adam", "AdamW")
TWINS = [
    Twin("SGD"),
    Twin("SGD", {"momentum": 0.9}),
    Twin("Adam", {"weight_decay": 0.1}),
    Twin("Adam", {"amsgrad": True}),
    Twin("AdamW"),
]

each_name = pytest.mark.parametrize("name", NAMES)
each_twin = pytest.mark.parametrize("twin", TWINS, ids=str)


def ours(name: str) -> Any:
    return getattr(stepwell, name)


def theirs(name: str) -> Any:
    return getattr(torch.optim, name)


class SignDescent(stepwell.Optimizer):
    """A rule of a user's own, outside the package."""

    lr: NonNegative = 1e-2
    momentum: Decay = 0.9

    exp_avg = zeros()

    @staticmethod
    def update(param, grad, state, group):
        state.exp_avg = lerp(state.exp_avg, grad, 1 - group.momentum)
        return param - group.lr * sign(state.exp_avg)


SHAPES = ((3, 4), (5,), ())


def weights(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0, **kind: Any) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(**kind)) for shape in shapes]


def named_weights(names: str = "a b c", seed: int = 0) -> list[tuple[str, Any]]:
    """Parameters called by these letters; a letter has the same shape and value everywhere."""
    letters = names.split()
    return [(n, weights([(2, 1 + ord(n) - ord("a"))], seed + ord(n))[0]) for n in letters]


def fill_grads(params: Sequence[Tensor], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)


def train(optimizer: Any, steps: int = 3, seed: int = 0) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        fill_grads(params, 100 * seed + step)
        optimizer.step()


def snapshot(optimizer: Any) -> Any:
    """Everything that a refused call must not change, by value."""
    return (
        [dict(group) for group in optimizer.param_groups],
        [list(group["params"]) for group in optimizer.param_groups],
        [param.detach().clone() for group in optimizer.param_groups for param in group["params"]],
        {id(k): _copied(v) for k, v in optimizer.state.items()},
        dict(optimizer.defaults),
    )


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, all the way down."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), f"{where}: {found!r} is no Tensor"
        assert found.dtype == expected.dtype, f"{where}: {found.dtype}, not {expected.dtype}"
        assert torch.equal(found, expected), f"{where}: {found} is not {expected}"
    elif isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found!r} is no dict"
        assert found.keys() == expected.keys(), f"{where}: {list(found)}, not {list(expected)}"
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), f"{where}: {len(found)} items, not {len(expected)}"
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert found == expected, f"{where}: {found!r} is not {expected!r}"


def refused(call: Callable[[], Any]) -> Exception:
    """The error that a call ends with."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value
