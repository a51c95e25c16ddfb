"""Update rules as functions on lists of tensors, with the arguments of `torch.optim.functional`.

    adamw(params, grads, exp_avgs, exp_avg_sqs, [], state_steps, amsgrad=False, beta1=0.9, ...)

Each function is made from the class of its rule, so both have one formula, and run on the same
back-ends. This module holds torch's argument names and their order.

Parameters and state are updated in place; an item of a list that is None is filled in. No hook
runs, and nothing is kept from call to call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .compiling import outside_graphs
from .language import program_for
from .optimizer import Optimizer
from .optimizers import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from .stand_ins import stand_ins, take_step

__all__ = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sparse_adam",
]

# Lists that are not called after the entry of the state, with an s.
ENTRIES = {
    "state_steps": "step",
    "state_sums": "sum",
    "momentum_buffer_list": "momentum_buffer",
    "muon_momentum_bufs": "momentum_buffer",
}
# Hyperparameters that torch takes apart.
PARTS = {
    "betas": ("beta1", "beta2"),
    "eps": ("eps1", "eps2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}
# Arguments that are no hyperparameters. What `has_` says is seen in the tensors.
OTHERS = {
    "foreach": None,
    "grad_scale": None,
    "found_inf": None,
    "has_complex": False,
    "has_sparse_grad": False,
}


class _Function:
    """A function of this module: its name, its rule, and what torch calls the arguments.

    Args:
        name: the function's
        rule: the class
        lists: parameters, gradients and state
        flags: what else may be positional
        keywords: what must be given by keyword, and, with a "?", what may be
        counted: whether the caller has counted the step already, as numbers
    """

    def __init__(
        self, name: str, rule: type[Optimizer], lists: str, flags: str, keywords: str, counted: bool
    ) -> None:
        self.name = name
        self.rule = rule
        self.counted = counted
        self.params, self.grads, *states = lists.split()
        self.entries = {spelt: ENTRIES.get(spelt, spelt.removesuffix("s")) for spelt in states}
        kind = inspect.Parameter
        either, keyword = kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY
        self.signature = inspect.Signature(
            [
                *(kind(spelt, either, annotation=list[Tensor]) for spelt in lists.split()),
                *(self._parameter(spelt, either) for spelt in flags.split()),
                *(self._parameter(spelt, keyword) for spelt in keywords.split()),
            ],
            return_annotation=None,
        )

    def _parameter(self, spelt: str, kind: Any) -> inspect.Parameter:
        name = spelt.rstrip("?")
        known = self.rule.declaration.signature().parameters.get(name)
        default = OTHERS.get(name) if known is None else known.default
        if kind is inspect.Parameter.KEYWORD_ONLY and name == spelt:
            default = inspect.Parameter.empty
        hint = Any if known is None else known.annotation
        return inspect.Parameter(name, kind, default=default, annotation=hint)

    def call(self, args: Any, kwargs: Any) -> None:
        """Check the arguments of a call, then take the step.

        Raises:
            TypeError, ValueError, RuntimeError: an argument is not as it must be; nothing is
                changed
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}() {error}") from None
        bound.apply_defaults()
        given = bound.arguments
        for spelt in (self.params, self.grads, *self.entries):
            if not isinstance(given[spelt], (list, tuple)):
                raise TypeError(
                    f"{self.name}: {spelt} must be a list of Tensors, got "
                    f"{type(given[spelt]).__name__}"
                )
        params, grads = given[self.params], given[self.grads]
        optimizer = stand_ins(self.rule, self._options(given), params)
        self._check(params, grads)
        states = [self._state(given, i) for i in range(len(params))]
        self._check_lists(optimizer, given)
        scaling = {name: given.get(name) for name in ("grad_scale", "found_inf")}
        take_step(optimizer, grads, states, **scaling)
        self._hand_back(given, states)

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters as the class takes them."""
        found = {}
        for name, field in self.rule.declaration.fields.items():
            parts = PARTS.get(name, ()) if field.items else ()
            if parts:
                found[name] = tuple(given[part] for part in parts)
            elif name in given:
                found[name] = given[name]
        return found

    def _check(self, params: Any, grads: Any) -> None:
        if len(params) != len(grads):
            raise ValueError(
                f"{self.name}: {self.grads} must have one gradient for each of the {len(params)} "
                f"params, got {len(grads)}"
            )
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            place = f"{self.name}: {self.grads}[{index}]"
            if not isinstance(grad, Tensor):
                raise TypeError(
                    f"{place} must be a Tensor, got {type(grad).__name__}; leave a parameter that "
                    "has no gradient out of all lists"
                )
            one, other = ((t.shape, t.device, t.is_complex()) for t in (grad, param))
            if one != other:
                raise RuntimeError(
                    f"{place} must be like its parameter, {_shown(param)}, got {_shown(grad)}"
                )

    def _check_lists(self, optimizer: Optimizer, given: Mapping[str, Any]) -> None:
        """Refuse a list that is empty although the rule keeps what is in it."""
        members, formula = optimizer.param_groups[0]["params"], optimizer._state_formula()
        assert formula is not None
        for spelt, entry in self.entries.items():
            for member in members if not given[spelt] else ():
                if (
                    entry
                    in program_for(formula, optimizer.param_groups[0], ndim=member.dim()).slots
                ):
                    raise ValueError(
                        f"{self.name}: {spelt} is empty; with these hyperparameters it must have "
                        f"one item for each of the {len(members)} params"
                    )

    def _state(self, given: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The state of one parameter, from the lists."""
        found = {}
        for spelt, entry in self.entries.items():
            values = given[spelt]
            if values and len(values) != len(given[self.params]):
                raise ValueError(
                    f"{self.name}: {spelt} must have one item for each of the "
                    f"{len(given[self.params])} params, got {len(values)}"
                )
            if values and values[index] is not None:
                found[entry] = values[index]
        if self.counted:
            found["step"] = self._before(found.get("step"))
        elif "step" in found and not isinstance(found["step"], Tensor):
            raise RuntimeError(
                "API has changed, `state_steps` argument must contain a list of singleton tensors "
                f"({self.name}: state_steps[{index}] is {found['step']!r})"
            )
        return found

    def _before(self, counted: Any) -> Tensor:
        if counted is None or not counted >= 1:
            raise ValueError(
                f"{self.name}: state_steps must count the step that is taken, from 1 on, got "
                f"{counted}"
            )
        return torch.tensor(float(counted) - 1, device="cpu")

    def _hand_back(self, given: Mapping[str, Any], states: list[dict[str, Any]]) -> None:
        """Put what was made, or replaced, where the caller looks for it."""
        for spelt, entry in self.entries.items():
            values = given[spelt]
            if not values or (self.counted and entry == "step"):
                continue
            for index, state in enumerate(states):
                held, now = values[index], state.get(entry)
                if held is None:
                    values[index] = now
                elif now is not held:
                    held.copy_(now)


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


def _function(
    name: str, rule: type[Optimizer], lists: str, flags: str, keywords: str, counted: bool = False
) -> Callable[..., None]:
    made = _Function(name, rule, lists, flags, keywords, counted)

    @outside_graphs
    def function(*args: Any, **kwargs: Any) -> None:
        made.call(args, kwargs)

    function.__name__ = function.__qualname__ = name
    function.__signature__ = made.signature  # type: ignore[attr-defined]
    kept = "".join(f"    {s}: state[{e!r}] of each\n" for s, e in made.entries.items())
    function.__doc__ = f"""Take one step of `stepwell.{rule.__name__}`, whose arguments it has.

Args:
    {made.params}: parameters to update
    {made.grads}: the gradient of each
{kept}"""
    return function


adadelta = _function(
    "adadelta",
    Adadelta,
    "params grads square_avgs acc_deltas state_steps",
    "capturable foreach differentiable has_complex",
    "lr rho eps weight_decay maximize",
)
adafactor = _function(
    "adafactor",
    Adafactor,
    "params grads row_vars col_vars variances state_steps",
    "foreach grad_scale found_inf has_complex",
    "d lr beta2_decay weight_decay eps1 eps2 maximize",
)
adagrad = _function(
    "adagrad",
    Adagrad,
    "params grads state_sums state_steps",
    "fused grad_scale found_inf has_sparse_grad foreach differentiable has_complex",
    "lr weight_decay lr_decay eps maximize",
)
adam = _function(
    "adam",
    Adam,
    "params grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps",
    "foreach capturable differentiable fused grad_scale found_inf has_complex "
    "decoupled_weight_decay",
    "amsgrad beta1 beta2 lr weight_decay eps maximize",
)
adamax = _function(
    "adamax",
    Adamax,
    "params grads exp_avgs exp_infs state_steps",
    "foreach maximize differentiable capturable has_complex",
    "eps beta1 beta2 lr weight_decay",
)
adamw = _function(
    "adamw",
    AdamW,
    "params grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps",
    "foreach capturable differentiable fused grad_scale found_inf has_complex",
    "amsgrad beta1 beta2 lr weight_decay eps maximize",
)
asgd = _function(
    "asgd",
    ASGD,
    "params grads axs mus etas state_steps",
    "foreach maximize differentiable capturable has_complex",
    "lambd lr t0 alpha weight_decay",
)
muon = _function(
    "muon",
    Muon,
    "params grads muon_momentum_bufs",
    "",
    "foreach? lr weight_decay momentum nesterov ns_coefficients ns_steps eps adjust_lr_fn "
    "has_complex",
)
nadam = _function(
    "nadam",
    NAdam,
    "params grads exp_avgs exp_avg_sqs mu_products state_steps",
    "decoupled_weight_decay foreach capturable differentiable has_complex maximize",
    "beta1 beta2 lr weight_decay momentum_decay eps",
)
radam = _function(
    "radam",
    RAdam,
    "params grads exp_avgs exp_avg_sqs state_steps",
    "decoupled_weight_decay foreach differentiable capturable has_complex maximize",
    "beta1 beta2 lr weight_decay eps",
)
rmsprop = _function(
    "rmsprop",
    RMSprop,
    "params grads square_avgs grad_avgs momentum_buffer_list state_steps",
    "foreach maximize differentiable capturable has_complex",
    "lr alpha eps weight_decay momentum centered",
)
rprop = _function(
    "rprop",
    Rprop,
    "params grads prevs step_sizes state_steps",
    "foreach capturable maximize differentiable has_complex",
    "step_size_min step_size_max etaminus etaplus",
)
sgd = _function(
    "sgd",
    SGD,
    "params d_p_list momentum_buffer_list",
    "has_sparse_grad foreach fused grad_scale found_inf",
    "weight_decay momentum lr dampening nesterov maximize",
)
sparse_adam = _function(
    "sparse_adam",
    SparseAdam,
    "params grads exp_avgs exp_avg_sqs state_steps",
    "",
    "eps beta1 beta2 lr maximize",
    counted=True,
)
