"""What is trained: a model, data and a loss, apart from whoever trains it."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ParamGroups = list[dict[str, Any]]


class TaskError(ValueError):
    """The task cannot be raced; the message says what to do about it."""


def one_group(model: nn.Module, lr: float) -> ParamGroups:
    """All parameters with the same rate."""
    return [{"params": list(model.parameters()), "lr": lr}]


def share_correct(output: Tensor, target: Tensor) -> float:
    """Return the share of rows whose largest output is the target; NaN if that is no class."""
    chosen = output.argmax(dim=1) if output.dim() > 1 else output
    if target.is_floating_point() or chosen.shape != target.shape:
        return float("nan")
    return (chosen == target).double().mean().item()


@dataclass(frozen=True)
class Task:
    """A model to train, with its data.

        def mine() -> Task:
            return Task("mine", Net, (x, y), (x_test, y_test), nn.functional.cross_entropy)

    in `mine.py` is raced by `python -m stepwell race --task mine:mine`.

    Attributes:
        name: what tables and pictures call it
        model: makes a fresh model; called under a fixed seed
        train: inputs and targets to learn from, one row each
        test: inputs and targets to be judged by
        loss: (output, target) -> the mean loss of the rows, a scalar Tensor
        accuracy: (output, target) -> the score shown, from 0 to 1, or NaN if there is none
        groups: (model, lr) -> parameter groups, for rates that differ within the model
        rates: the `lr` of an optimizer by the name of its class, where the default does not suit
    """

    name: str
    model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    accuracy: Callable[[Tensor, Tensor], float] = share_correct
    groups: Callable[[nn.Module, float], ParamGroups] = one_group
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            inputs, targets = getattr(self, part)
            if len(inputs) != len(targets) or len(inputs) == 0:
                raise TaskError(
                    f"Task {self.name}: {part} must hold as many inputs as targets and at least "
                    f"one, got {len(inputs)} inputs and {len(targets)} targets"
                )

    @property
    def device(self) -> torch.device:
        """Where the data lie, and so where the model is trained."""
        return self.train[0].device


def load(name: str) -> Task:
    """The task that `module:function` makes.

    Raises:
        TaskError: there is no such module or function, or it makes no Task
    """
    module_name, colon, function_name = name.partition(":")
    parts = [*module_name.split("."), function_name]
    if not colon or not all(part.isidentifier() for part in parts):
        raise TaskError(
            "task must be MODULE:FUNCTION, with the module as Python imports it, such as "
            f"stepwell.race.digits:digits, got {name!r}"
        )
    task = _function(_module(module_name), function_name)()
    if not isinstance(task, Task):
        raise TaskError(
            f"{name} must return a stepwell.race.Task, got {type(task).__module__}."
            f"{type(task).__qualname__}"
        )
    return task


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a module that the user's own module lacks is the user's to see in full
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise TaskError(
            f"no module named {error.name!r}: run the command in the folder that holds "
            f"{name.replace('.', '/')}.py, or install it"
        ) from None


def _function(module: Any, name: str) -> Callable[[], object]:
    function = getattr(module, name, None)
    if callable(function):
        _check_signature(function, f"{module.__name__}:{name}")
        return function  # type: ignore[no-any-return]
    known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(near)}?" if near else ""
    raise TaskError(f"module {module.__name__} has no function {name!r}{hint}")


def _check_signature(function: Callable[..., object], name: str) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise TaskError(f"{name} must be callable without arguments ({error})") from error
    except ValueError:
        # no signature can be found: some functions written in C
        return
