"""compose: a rule and transforms around it become one class, whose step is one pass."""

from __future__ import annotations

import copyreg
from typing import Any

from torch.optim import Optimizer as TorchOptimizer

from .language import Transform
from .optimizer import Optimizer

__all__ = ["check_class", "compose"]


def compose(rule: type[Optimizer], *transforms: type[Transform]) -> type[Optimizer]:
    """The rule with transforms before and after it, all in one pass over memory.

    `compose(AdamW, ClipNorm)(params, lr=1e-3, max_norm=1.0)` clips and updates in one kernel. The
    first transform is the outermost. Their hyperparameters become keyword arguments, and keys of
    the groups. The same call gives the same class, which can be pickled.

    Raises:
        TypeError: the first is no rule, one of the others is no transform, or two of them declare
            the same hyperparameter or state
    """
    _check_parts(rule, transforms)
    if not transforms:
        return rule
    base, before = vars(rule).get("_composed", (rule, ()))
    applied = (*transforms, *before)
    made: dict[Any, type[Optimizer]] = vars(base).get("_compositions", {})
    if not made:
        base._compositions = made
    if applied not in made:
        name = "+".join(part.__name__ for part in (base, *applied))
        body = {
            "__doc__": f"{base.__name__} composed with {', '.join(t.__name__ for t in applied)}.",
            "__module__": base.__module__,
            "__reduce__": _reduce_composed,
            "_composed": (base, applied),
            "transforms": (*applied, *base.transforms),
        }
        made[applied] = type(name, (base,), body)
    return made[applied]


def check_class(rule: Any, owner: str, call: str) -> None:
    """Refuse an optimizer that has been made already, where its class is meant.

    Args:
        rule: what was given
        owner: whom the message names
        call: what to write, with {} for the name of the class

    Raises:
        TypeError: it is an instance
    """
    if isinstance(rule, TorchOptimizer):
        name = type(rule).__name__
        raise TypeError(
            f"{owner}: rule must be a class, got an instance of {name}; use "
            f"{call.format(name)}(params, ...)"
        )


def _check_parts(rule: Any, transforms: tuple[Any, ...]) -> None:
    check_class(rule, "compose", "compose({}, ...)")
    if not (isinstance(rule, type) and issubclass(rule, Optimizer) and rule.formula is not None):
        raise TypeError(f"compose: rule must be an optimizer class of stepwell, got {rule!r}")
    for transform in transforms:
        if not (isinstance(transform, type) and issubclass(transform, Transform)):
            raise TypeError(
                "compose: transforms must be subclasses of stepwell.language.Transform, got "
                f"{transform!r}"
            )


def _reduce_composed(self: Optimizer) -> Any:
    """Such a class cannot be found by name: its instances are pickled with its parts."""
    cls = type(self)
    if "_composed" in vars(cls):
        return _blank, vars(cls)["_composed"], self.__getstate__()
    return copyreg.__newobj__, (cls,), self.__getstate__()  # type: ignore[attr-defined]


def _blank(rule: type[Optimizer], transforms: tuple[type[Transform], ...]) -> Optimizer:
    cls = compose(rule, *transforms)
    return cls.__new__(cls)
