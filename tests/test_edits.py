"""Do steps stay those of torch.optim whatever a user does between them, in any order?

Each draw is a training of ten steps: before each, a few edits that torch allows are made to both.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell

from .cases import PLAIN, REQUESTS, Case, named

SHAPES = ((3, 4), (5,), (), (0, 2), (2, 3, 2))
STEPS = 10
NUMBERS = ("step", "mu_product", "eta", "mu")


class Side:
    """One of two optimizers to which the same is done, with all that is drawn for it."""

    def __init__(self, optimizer: Any, params: list[Any], seed: int) -> None:
        self.optimizer = optimizer
        self.params = params
        self.shapes = [param.shape for param in params]
        self.draw = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=self.numbers, dtype=torch.float64)

    def laid(self, tensor: Tensor) -> Tensor:
        """The same numbers in some place and order of memory."""
        way = self.draw.randrange(5)
        if way == 0 and tensor.dim() > 1:
            return tensor.mT.contiguous().mT
        if way == 1:
            return torch.stack([tensor, tensor], -1)[..., 1]
        if way == 2:
            room = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
            return room[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)
        return tensor.clone()

    def any_param(self) -> Any:
        return self.draw.choice([p for g in self.optimizer.param_groups for p in g["params"]])

    def any_group(self) -> Any:
        return self.draw.choice(self.optimizer.param_groups)

    def some_state(self) -> tuple[Any, dict[str, Any]]:
        param = self.any_param()
        return param, self.optimizer.state.get(param, {})

    # Edits

    def new_data(self) -> None:
        param = self.any_param()
        param.data = self.laid(self.normal(param.shape).to(param.dtype))

    def written_data(self) -> None:
        with torch.no_grad():
            self.any_param().mul_(0.5)

    def another_shape(self) -> None:
        param = self.any_param()
        if type(self.optimizer).__name__ != "Adagrad":
            self.optimizer.state.pop(param, None)
            param.data, param.grad = self.laid(self.normal(self.draw.choice(self.shapes))), None

    def another_parameter(self) -> None:
        group = self.any_group()
        if type(self.optimizer).__name__ != "Adagrad":
            param = nn.Parameter(self.laid(self.normal(self.draw.choice(self.shapes))))
            self.optimizer.state.pop(group["params"][0], None)
            group["params"][0] = param
            self.params.append(param)

    def another_precision(self) -> None:
        param, state = self.some_state()
        kind = torch.float32 if param.dtype is torch.float64 else torch.float64
        param.data, param.grad = param.data.to(kind), None
        for name, value in state.items():
            if isinstance(value, Tensor) and name not in NUMBERS:
                state[name] = value.to(kind)

    def new_state(self) -> None:
        _, state = self.some_state()
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = self.laid(value) if name != "step" else value.clone()

    def written_state(self) -> None:
        _, state = self.some_state()
        for name, value in state.items():
            if isinstance(value, Tensor) and name not in NUMBERS:
                value.mul_(0.5)

    def counted_anew(self) -> None:
        _, state = self.some_state()
        if "step" in state:
            state["step"] = torch.tensor(float(state["step"]) + 3)

    def counted_in_place(self) -> None:
        _, state = self.some_state()
        if "step" in state:
            state["step"] += 2

    def lost_state(self) -> None:
        # Adagrad's is made in the constructor
        if type(self.optimizer).__name__ != "Adagrad":
            self.optimizer.state.pop(self.any_param(), None)

    def other_keys(self) -> None:
        _, state = self.some_state()
        if state:
            state["a user's own"] = self.draw.random()

    def rate(self) -> None:
        self.any_group()["lr"] = self.draw.uniform(0.01, 0.1)

    def rate_in_a_tensor(self) -> None:
        group = self.any_group()
        group["lr"] = torch.tensor(self.draw.uniform(0.01, 0.1), dtype=torch.float64)

    def rate_in_place(self) -> None:
        group = self.any_group()
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(0.5)

    def decay(self) -> None:
        group = self.any_group()
        if "weight_decay" in group:
            group["weight_decay"] = self.draw.choice([0, 0.1, 0.2])

    def direction(self) -> None:
        group = self.any_group()
        group["maximize"] = not group["maximize"]

    def betas(self) -> None:
        group = self.any_group()
        if "betas" in group:
            group["betas"] = (self.draw.uniform(0.5, 0.9), self.draw.uniform(0.9, 0.99))

    def joined(self) -> None:
        param = nn.Parameter(self.laid(self.normal(self.draw.choice(self.shapes))))
        self.params.append(param)
        if self.draw.random() < 0.5 and type(self.optimizer).__name__ != "Adagrad":
            self.any_group()["params"].append(param)
        else:
            self.optimizer.add_param_group({"params": [param], "lr": 0.03})

    def left(self) -> None:
        group = self.any_group()
        if len(group["params"]) > 1:
            param = group["params"].pop(self.draw.randrange(len(group["params"])))
            # torch cannot load what it saves with the state of a parameter that has left
            self.optimizer.state.pop(param, None)

    def moved(self) -> None:
        first, second = self.optimizer.param_groups[0], self.optimizer.param_groups[-1]
        if first is not second and len(first["params"]) > 1:
            second["params"].append(first["params"].pop())

    def reordered(self) -> None:
        self.draw.shuffle(self.any_group()["params"])

    def loaded(self) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def copied(self) -> None:
        self.optimizer, self.params = copy.deepcopy((self.optimizer, self.params))

    def frozen(self) -> None:
        param = self.any_param()
        param.requires_grad_(not param.requires_grad)

    def step(self) -> None:
        for param in (p for g in self.optimizer.param_groups for p in g["params"]):
            chance = self.draw.random()
            param.grad = None
            if chance < 0.15:
                continue
            grad = self.normal(param.shape).to(param.dtype)
            if chance < 0.3:
                grad = grad.sum().expand(param.shape)
            param.grad = self.laid(grad) if chance > 0.4 else grad
        self.optimizer.step()


EDITS: tuple[Callable[[Side], None], ...] = tuple(
    edit
    for name, edit in vars(Side).items()
    if callable(edit)
    and not name.startswith("_")
    and name not in ("normal", "laid", "any_param", "any_group", "some_state", "step")
)


def _side(make: Any, seed: int, shapes: Any) -> Side:
    start = Side(None, [], seed)
    params = [nn.Parameter(start.laid(start.normal(shape))) for shape in shapes]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]
    return Side(make(groups), params, seed)


def _follow(case: Case, request_: str, seed: int) -> None:
    # torch's Adafactor divides by how many elements there are
    shapes = [s for s in SHAPES if 0 not in s or case.rule is not stepwell.Adafactor]
    ours = _side(lambda groups: case.make(groups, **REQUESTS[request_]), seed, shapes)
    theirs = _side(lambda groups: case.make_twin(groups, foreach=False), seed, shapes)
    plan = random.Random(f"{seed} {case.name} {request_}")
    done: list[str] = []
    for _ in range(STEPS):
        for edit in plan.sample(EDITS, plan.randrange(4)):
            done.append(edit.__name__)
            edit(ours)
            edit(theirs)
        done.append("step")
        ours.step()
        theirs.step()
        for number, (one, other) in enumerate(zip(ours.params, theirs.params, strict=True)):
            # some are in float32 for a while, as torch's counts and what it makes of them are
            torch.testing.assert_close(
                one, other, rtol=1e-4, atol=1e-5, msg=f"parameter {number} after {done}"
            )


# with TRITON_INTERPRET=1 these go through the kernels for GPUs
@pytest.mark.interpret
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(PLAIN))
def test_random_edits(case: Case, request_: str) -> None:
    _follow(case, request_, 0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 40))
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("case", **named(PLAIN))
def test_many_random_edits(case: Case, request_: str, seed: int) -> None:
    _follow(case, request_, seed)
