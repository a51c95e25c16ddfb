"""What LambdaLR and MultiplicativeLR share: functions of the step, one per group."""

from __future__ import annotations

import pickle
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from .scheduler import LRScheduler, require_optimizer

Function = Callable[[int], float]


class FunctionsLR(LRScheduler):
    """A schedule by functions of the user's; objects that can be called are saved by their dict."""

    unsaved = LRScheduler.unsaved | {"lr_lambdas"}

    def __init__(
        self, optimizer: Optimizer, lr_lambda: Function | Sequence[Function], last_epoch: int = -1
    ) -> None:
        require_optimizer(optimizer, type(self).__name__)
        self.lr_lambdas = _functions(lr_lambda, len(optimizer.param_groups), type(self).__name__)
        super().__init__(optimizer, last_epoch)

    def _factors(self, step: int) -> list[float]:
        """What the functions say at a step, for each group."""
        groups, known = self.optimizer.param_groups, self.lr_lambdas
        # a group that joined follows the function that all others share, or keeps its own rate
        shared = known[0] if all(function is known[0] for function in known) else _one
        joined = [shared] * (len(groups) - len(known))
        functions = [*known, *joined][: len(groups)]
        said = {id(function): function(step) for function in functions}
        return [said[id(function)] for function in functions]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer and plain functions, in torch's layout."""
        owner = type(self).__name__
        saved = [attributes_of(f, f"{owner}: lr_lambda {i}") for i, f in enumerate(self.lr_lambdas)]
        return {**super().state_dict(), "lr_lambdas": saved}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        saved, owner = state.get("lr_lambdas", []), type(self).__name__
        if not all(item is None or isinstance(item, Mapping) for item in saved):
            raise TypeError(
                f"{owner}: the state's 'lr_lambdas' must be a list of the attributes of each "
                f"function, a dict or None, got {saved!r}"
            )
        if len(saved) > len(self.lr_lambdas):
            raise ValueError(
                f"{owner}: the state holds {len(saved)} lr_lambdas, there are "
                f"{len(self.lr_lambdas)}"
            )
        for index, (attributes, function) in enumerate(zip(saved, self.lr_lambdas, strict=False)):
            if attributes:
                require_object(function, f"lr_lambda {index}", owner)

    def _take_state(self, state: dict[str, Any]) -> None:
        saved = state.pop("lr_lambdas", [])
        super()._take_state(state)
        for attributes, function in zip(saved, self.lr_lambdas, strict=False):
            if attributes is not None:
                vars(function).update(attributes)


def _one(step: int) -> float:
    return 1.0


def _functions(given: Any, count: int, owner: str) -> list[Function]:
    functions = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(functions) != count:
        raise ValueError(
            f"Expected {count} lr_lambdas, but got {len(functions)} ({owner}: give one function "
            "for all groups, or a list of one per group)"
        )
    for function in functions:
        if not callable(function):
            raise TypeError(
                f"lr_lambda should be a function, but got {type(function).__name__} "
                f"({owner}: it must take the step and return a factor)"
            )
    return functions


def require_object(function: Any, name: str, owner: str) -> None:
    """Check that attributes that were saved can be given back to what is called now.

    Raises:
        ValueError: it is a plain function, or there is none
    """
    if isinstance(function, types.FunctionType) or not hasattr(function, "__dict__"):
        raise ValueError(
            f"{owner}: the state holds the attributes of an object as {name}, which is "
            f"{function!r} now; give an object of the class that was saved"
        )


def attributes_of(function: Any, place: str) -> dict[str, Any] | None:
    """The attributes of an object that is called; a function has nothing that could be saved."""
    if isinstance(function, types.FunctionType) or not hasattr(function, "__dict__"):
        return None
    attributes = dict(vars(function))
    for name, value in attributes.items():
        problem = _problem(value)
        if problem:
            warnings.warn(
                f"{place}, a {type(function).__name__}, cannot be saved: its attribute '{name}' is "
                f"{value!r}: {problem}",
                UserWarning,
                stacklevel=4,
            )
    return attributes


def _problem(value: Any) -> str | None:
    """What keeps pickle from saving a value, if anything does."""
    try:
        pickle.dumps(value)
    # objects raise what they like
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
