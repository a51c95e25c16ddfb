"""Is all of torch.optim here, with the same names, arguments, defaults, state and numbers?

Nothing may differ but what docs/differences.md says. Names and arguments are in
test_torch_versions.py, the numbers under each flag in test_twins.py, the messages in
test_messages.py, the rows one by one in test_differences.py.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import stepwell

from .cases import CLASSES, PLAIN, named, numbers, parameters, set_grads
from .compare import assert_within, real
from .differences import ARGUMENTS, STATE, TYPES

Kinds = inspect.Parameter


def _has(name: str) -> bool:
    return hasattr(stepwell, name)


def _public(name: str) -> Any:
    return getattr(torch.optim, name)


# torch 2.11's own SparseAdam warns
pytestmark = pytest.mark.filterwarnings("ignore:.*Sparse invariant")

WITH_BASE = [*CLASSES, "Optimizer"]


@dataclass(frozen=True)
class Task:
    """A class with hyperparameters, and what it learns from."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # what only ours is given, to compute as torch does
    ours: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((1,), (7,), (10, 6), (), (3, 2, 5))
    sparse: bool = False
    dtype: torch.dtype = torch.float32
    # in ULP of the mean size of a kind: a dozen steps, each rounded some times more by torch
    limit: float = 64

    def make(self, library: Any, params: Any) -> Any:
        """Torch's, or ours."""
        own = self.ours if library is stepwell else {}
        return getattr(library, self.name)(params, **self.options, **own)

    def parameters(self, seed: int = 0) -> list[Any]:
        """What it trains."""
        return parameters(self.shapes, self.dtype, seed)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


MATRICES = ((6, 6), (4, 10), (10, 4))
WOLFE = {"max_iter": 2, "line_search_fn": "strong_wolfe"}
TASKS = [
    *(Task(case.rule.__name__, case.options) for case in PLAIN),
    Task("Adafactor", {"lr": 0.05}),
    Task("Adafactor", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    # products in bfloat16: torch multiplies in another order
    Task("Muon", {"lr": 0.02}, {"ns_dtype": "bfloat16"}, MATRICES, limit=2**16),
    Task("SparseAdam", {"lr": 0.02}, sparse=True, shapes=((6, 3), (9,), (5, 2, 2))),
    # each step has many iterations, which amplify what the first of them rounded
    Task("LBFGS", {"lr": 0.5, "max_iter": 2}, dtype=torch.float64, limit=2**30),
    Task("LBFGS", WOLFE, dtype=torch.float64, limit=2**30),
]
TASKS = [task for task in TASKS if _has(task.name)]


def take_step(task: Task, optimizer: Any, step: int) -> None:
    """One step, with the same gradients whoever takes it."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if inspect.signature(_public(task.name).step).parameters["closure"].default is Kinds.empty:
        optimizer.step(_closure(params))
        return
    set_grads(params, step)
    if task.sparse:
        for param in params:
            rows = torch.tensor([[step % param.shape[0], (step + 2) % param.shape[0]]])
            sizes = (2, *param.shape[1:])
            values = numbers(sizes, param.dtype, 31 * step)
            param.grad = torch.sparse_coo_tensor(rows, values, param.shape, check_invariants=True)
    optimizer.step()


def _closure(params: list[Tensor]) -> Any:
    """A quadratic whose directions differ in steepness, its lowest point away from zero."""
    targets = [numbers(param.shape, param.dtype, 5 + i) for i, param in enumerate(params)]
    weights = [1 + torch.arange(t.numel()).reshape(t.shape) for t in targets]

    def closure() -> Tensor:
        for param in params:
            param.grad = None
        pulls = zip(params, targets, weights, strict=True)
        loss = sum(((p - t) ** 2 * w).sum() for p, t, w in pulls)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    return closure


def trained(task: Task, library: Any, steps: int, seed: int = 0) -> Any:
    """An optimizer after some steps."""
    optimizer = task.make(library, task.parameters(seed))
    for step in range(steps):
        take_step(task, optimizer, step)
    return optimizer


# Names


@pytest.mark.parametrize("name", WITH_BASE)
def test_is_torchs_optimizer_and_its_twin_in_name(name: str) -> None:
    ours = getattr(stepwell, name)
    assert issubclass(ours, torch.optim.Optimizer)
    assert ours.__name__ == _public(name).__name__


def test_what_is_imported_from_torchs_module_can_be_imported_from_ours() -> None:
    module = importlib.import_module("torch.optim.optimizer")
    ours = importlib.import_module("stepwell.optimizer")
    names = {name for name in vars(module) if not name.startswith("__")}
    # all but these are one and the same, registries of hooks included
    own = {name for name in names if getattr(ours, name) is not getattr(module, name)}
    assert own <= {"Optimizer", "StateDict"}
    assert ours.Optimizer is stepwell.Optimizer
    with pytest.raises(
        AttributeError, match=r"module 'stepwell\.optimizer' has no attribute 'Adam'"
    ):
        _ = ours.Adam


def test_an_optimizer_written_with_torchs_helpers_needs_one_import_changed() -> None:
    def steps(module: Any) -> Tensor:
        class Plain(module.Optimizer):  # type: ignore[name-defined, misc]
            def __init__(self, params: Any, lr: Any = module.required) -> None:
                super().__init__(params, {"lr": lr, "differentiable": False})

            @module._use_grad_for_differentiable
            def step(self, closure: Any = None) -> None:
                for group in self.param_groups:
                    for param in group["params"]:
                        param.add_(param.grad, alpha=-module._get_value(torch.tensor(group["lr"])))

        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.raises(ValueError, match="required optimization parameter lr"):
            Plain([param])
        seen: list[Any] = []
        handle = module.register_optimizer_step_post_hook(lambda *args: seen.append(args[0]))
        optimizer = Plain([{"params": [param], "lr": 0.5}])
        optimizer.step()
        handle.remove()
        assert seen == [optimizer]
        return param.detach()

    names = ("torch.optim.optimizer", "stepwell.optimizer")
    assert torch.equal(*(steps(importlib.import_module(name)) for name in names))


# Arguments


# something else than the default for each positional argument, of those that have other ones
POSITIONAL: dict[str, Any] = {
    "SGD": (0.5, 0.9, 0.1, 0.2, False),
    "Adagrad": (0.5, 0.1, 0.2, 0.3, 1e-3, False),
    "RMSprop": (0.5, 0.8, 1e-3, 0.2, 0.7, True, False, False, True, False),
    "Adadelta": (0.5, 0.8, 1e-3, 0.2, False),
    "Adamax": (0.5, (0.8, 0.9), 1e-3, 0.2, False),
    "NAdam": (0.5, (0.8, 0.9), 1e-3, 0.2, 0.1, True),
    "ASGD": (0.5, 0.1, 0.6, 10.0, 0.2, False, True, False, False),
    "Rprop": (0.5, (0.4, 1.3), (1e-3, 1.0)),
    "Muon": (0.5, 0.2, 0.8, False, (3.0, -4.0, 2.0), 1e-3, 4, "match_rms_adamw"),
    "Adafactor": (0.5, -0.7, (1e-9, 1e-2), 2.0, 0.1),
    "SparseAdam": (0.5, (0.8, 0.9), 1e-3, True),
    "LBFGS": (0.5, 7, 9, 1e-3, 1e-4, 5, "strong_wolfe"),
}


@pytest.mark.tiny
@pytest.mark.parametrize("name", CLASSES)
def test_positional_arguments(name: str) -> None:
    arguments = inspect.signature(_public(name)).parameters.values()
    given = POSITIONAL.get(name, (0.5, (0.8, 0.9), 1e-3, 0.2, True))
    assert len(given) == sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in arguments) - 1
    ours, theirs = (
        getattr(lib, name)(parameters(MATRICES, torch.float32), *given)
        for lib in (stepwell, torch.optim)
    )
    for key in theirs.defaults:
        assert ours.defaults[key] == theirs.defaults[key]


# Groups and defaults


@pytest.mark.tiny
@pytest.mark.parametrize("name", CLASSES)
def test_defaults_and_keys_of_groups(name: str) -> None:
    ours, theirs = (
        getattr(lib, name)(parameters(MATRICES, torch.float32)) for lib in (stepwell, torch.optim)
    )
    more = ARGUMENTS[name]
    assert ours.defaults.keys() == theirs.defaults.keys() | more
    for held in ("defaults", "group", "saved"):
        one, other = (_held(optimizer, held) for optimizer in (ours, theirs))
        # a key that torch's groups lack would be looked for in what torch has saved
        listed = other.keys() - more
        assert one.keys() == (other.keys() | more if held == "defaults" else listed)
        kinds = {key: (type(value), value) for key, value in one.items() if key in other}
        assert kinds == {k: (type(v), v) for k, v in other.items() if k in one}
    (group,) = ours.param_groups
    assert all(group[key] == ours.defaults[key] == group.get(key, ...) for key in more)


def _held(optimizer: Any, what: str) -> dict[str, Any]:
    if what == "defaults":
        return dict(optimizer.defaults)
    group = optimizer.param_groups[0] if what == "group" else None
    if group is None:
        return dict(optimizer.state_dict()["param_groups"][0])
    return {key: value for key, value in group.items() if key != "params"}


# State and numbers


def _tensors(value: Any, where: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every number of a state dict's entry, by its place, as a tensor."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = dict(enumerate(value)).items()
    elif value is None:
        return {}
    else:
        return {where: value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)}
    found = [_tensors(item, f"{where} {key}", dtype) for key, item in items]
    return {place: tensor for part in found for place, tensor in part.items()}


def _assert_agree(task: Task, ours: Any, theirs: Any, what: str) -> None:
    """The same parameters; the same state, in the same layout."""
    pairs = []
    for optimizer in (ours, theirs):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        state = optimizer.state_dict()["state"]
        found = {f"parameter {i}": param.detach() for i, param in enumerate(params)}
        pairs.append(found | _tensors(_shared(task, state), "state", task.dtype))
    one, other = pairs
    assert one.keys() == other.keys(), what
    for where, expected in other.items():
        size = float(real(expected).double().abs().mean()) if expected.numel() else 0.0
        got = one[where].to(expected.dtype)
        assert_within(got, expected, task.limit, f"{task}, {what}: {where}", size=size)


def _shared(task: Task, state: Any) -> Any:
    """The entries that both sides have."""
    apart = STATE[task.name]
    return {k: {n: v for n, v in entry.items() if n not in apart} for k, entry in state.items()}


@pytest.mark.parametrize("task", **named(TASKS))
def test_steps(task: Task) -> None:
    for steps in (1, 3, 12):
        ours, theirs = (trained(task, library, steps) for library in (stepwell, torch.optim))
        _assert_agree(task, ours, theirs, f"after {steps} steps")


@pytest.mark.parametrize("name", CLASSES)
def test_steps_with_defaults(name: str) -> None:
    task = next(task for task in TASKS if task.name == name)
    plain = replace(task, options={})
    ours, theirs = (trained(plain, library, 1) for library in (stepwell, torch.optim))
    _assert_agree(plain, ours, theirs, "with defaults")


@pytest.mark.parametrize("task", **named(TASKS))
def test_state_dicts_both_ways(task: Task) -> None:
    """Whoever saved and whoever loads, the next three steps are the same, and so is the layout."""
    results = []
    for source in (stepwell, torch.optim):
        saved = trained(task, source, 4)
        file = io.BytesIO()
        torch.save(saved.state_dict(), file)
        for target in (stepwell, torch.optim):
            file.seek(0)
            fresh = [
                torch.nn.Parameter(p.detach().clone()) for p in saved.param_groups[0]["params"]
            ]
            loaded = task.make(target, fresh)
            loaded.load_state_dict(torch.load(file, weights_only=True))
            for step in range(4, 7):
                take_step(task, loaded, step)
            results.append((f"{source.__name__} to {target.__name__}", loaded))
    _, reference = results[-1]
    for what, loaded in results[:-1]:
        _assert_agree(task, loaded, reference, what)


@pytest.mark.parametrize("task", **named(TASKS))
def test_state_dicts_have_torchs_layout(task: Task) -> None:
    ours, theirs = (trained(task, library, 3).state_dict() for library in (stepwell, torch.optim))
    assert list(ours) == list(theirs) == ["state", "param_groups"]
    for one, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert type(one) is dict
        assert one["params"] == other["params"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, entry in theirs["state"].items():
        kept = {name: value for name, value in entry.items() if value is not None}
        assert ours["state"][key].keys() ^ kept.keys() == STATE[task.name]
        for name in kept.keys() - STATE[task.name]:
            _assert_same_kind(task, name, ours["state"][key][name], kept[name])


def _assert_same_kind(task: Task, name: str, ours: Any, theirs: Any) -> None:
    differs = isinstance(ours, Tensor) != isinstance(theirs, Tensor)
    assert differs == (name in TYPES[task.name])
    if isinstance(ours, Tensor) and not differs:
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)


@pytest.mark.parametrize("task", **named(TASKS))
def test_state_of_the_wrong_shape_is_not_loaded(task: Task) -> None:
    saved, optimizer = trained(task, torch.optim, 2).state_dict(), trained(task, stepwell, 1)
    before = copy.deepcopy(optimizer.state_dict())
    for name, value in saved["state"].get(0, {}).items():
        if isinstance(value, Tensor) and value.dim():
            state = {**saved["state"], 0: {**saved["state"][0], name: torch.ones(13, 1)}}
            with pytest.raises(ValueError, match=task.name):
                optimizer.load_state_dict({**saved, "state": state})
            one, other = (
                _tensors(held["state"], "", task.dtype) for held in (optimizer.state_dict(), before)
            )
            assert one.keys() == other.keys()
            assert all(torch.equal(one[where], other[where]) for where in other)


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_for_all_optimizers_act_on_each(name: str) -> None:
    """Torch's registry and ours are one; the closure's result is the step's."""
    task = next(task for task in TASKS if task.name == name)
    seen: list[Any] = []
    theirs, ours = (importlib.import_module(f"{m}.optimizer") for m in ("torch.optim", "stepwell"))
    handles = [
        theirs.register_optimizer_step_pre_hook(lambda *args: seen.append(args[0])),
        ours.register_optimizer_step_post_hook(lambda *args: seen.append(args[0])),
    ]
    optimizers = [trained(task, library, 1) for library in (stepwell, torch.optim)]
    for handle in handles:
        handle.remove()
    assert seen == [optimizers[0]] * 2 + [optimizers[1]] * 2
    for optimizer in optimizers:
        take_step(task, optimizer, 1)
        assert type(optimizer).step.hooked
    assert len(seen) == 4


@pytest.mark.parametrize("task", **named(TASKS))
def test_state_can_be_made_and_measured_ahead(task: Task) -> None:
    """As a first step makes it, but for what begins as unset, or belongs to no parameter."""
    ahead, stepped = task.make(stepwell, task.parameters()), trained(task, stepwell, 1)
    ahead.init_state()
    if task.name in ("SGD", "LBFGS"):
        assert not any(ahead.state.values())
        assert ahead.state_bytes() == 0
        return
    for one, other in zip(ahead.state.values(), stepped.state.values(), strict=True):
        kinds = [{k: (v.dtype, v.shape, v.device) for k, v in s.items()} for s in (one, other)]
        assert kinds[0] == kinds[1]
    assert ahead.state_bytes() == stepped.state_bytes()
    bytes_of = [v.numel() * v.element_size() for s in stepped.state.values() for v in s.values()]
    assert ahead.state_bytes() == sum(bytes_of)
    take_step(task, ahead, 0)
    _assert_agree(task, ahead, trained(task, torch.optim, 1), "state made ahead")


@pytest.mark.parametrize("name", CLASSES)
def test_copies_train_on(name: str) -> None:
    """As torch's: a deep copy holds its own parameters."""
    task = next(task for task in TASKS if task.name == name)
    optimizer = trained(task, stepwell, 3)
    twin = copy.deepcopy(optimizer)
    for one in (optimizer, twin):
        take_step(task, one, 3)
    pairs = zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
