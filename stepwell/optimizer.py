"""Optimizer: the shell around every rule - groups, state, steps, hooks, checkpoints.

A rule declares hyperparameters, state and a formula; all else that torch.optim promises is done
here, once.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import Optimizer as TorchOptimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT as ParamsT
from torch.optim.optimizer import (
    register_optimizer_step_post_hook as register_optimizer_step_post_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_pre_hook as register_optimizer_step_pre_hook,
)
from torch.optim.optimizer import required as required

from .backends import import_unseen
from .cohort import Scaling, local_part
from .compiling import outside_graphs
from .declaration import Declaration, Flags, copied, declare, tensors_in
from .held_groups import check_groups
from .hooks import hooked, profiled
from .hyperparameters import is_elsewhere
from .inspection import check_dense
from .language import Formula, Transform, program_for
from .matching import LoadReport
from .param_groups import add_group, as_groups
from .persistence import Persistence
from .plan import Plan, Stepper
from .rehearsal import begin_anew, is_rehearsal, rehearse
from .state import create_state

# torch has it from 2.13 on
swap_in_optimizer_params_and_state: Any = getattr(
    torch.optim, "swap_in_optimizer_params_and_state", None
)

__all__ = [
    "LoadReport",
    "Optimizer",
    "ParamsT",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "required",
    "swap_in_optimizer_params_and_state",
]

Loss = TypeVar("Loss")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What else is imported from `torch.optim.optimizer`, such as its helpers, is torch's."""
        if hasattr(torch_optimizer, name):
            return getattr(torch_optimizer, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


UNSCALED = Scaling()


# torch's load_state_dict returns nothing
class Optimizer(Persistence, Flags, TorchOptimizer):  # type: ignore[misc]
    """Base class of all optimizers, and torch's `Optimizer` to whoever asks with isinstance.

    A rule is a subclass whose annotations are hyperparameters, whose `zeros()` and the like are
    state, and whose `update` is the formula:

        class SignDescent(stepwell.Optimizer):
            lr: NonNegative = 1e-3
            momentum: Decay = 0.9

            exp_avg = zeros()

            @staticmethod
            def update(param, grad, state, group):
                state.exp_avg = lerp(state.exp_avg, grad, 1 - group.momentum)
                return param - group.lr * sign(state.exp_avg)

    It may have a static method `check(group)`, which says what is wrong with hyperparameters that
    depend on each other, or None. `transforms` lists what its formula is composed with.

    A subclass in torch's manner works too: an `__init__` that passes `(params, defaults)` to this
    one, and a `step`.

    Attributes:
        param_groups: the hyperparameters and parameters of each group
        state: what is kept for each parameter
        defaults: the constructor's hyperparameters, for groups that do not have their own
    """

    formula: ClassVar[Formula | None] = None
    transforms: ClassVar[tuple[type[Transform], ...]] = ()
    densify: ClassVar[bool] = False
    """Sparse gradients are made dense where rows that they leave out would move too."""
    sparse_only: ClassVar[bool] = False
    """Gradients must be sparse; the rows that they leave out are left alone."""
    starts_with_state: ClassVar[bool] = False

    declaration: ClassVar[Declaration]
    _compositions: ClassVar[dict[Any, type[Optimizer]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._zero_grad_profile_name = f"Optimizer.zero_grad#{cls.__name__}.zero_grad"
        declare(cls, Optimizer)

    @property
    def composition(self) -> str:
        """Return the name of the rule in checkpoints, as in "AdamW+Average"."""
        return self.declaration.owner

    @staticmethod
    def check(group: Mapping[str, Any]) -> str | None:
        """What is wrong with these hyperparameters together, in words, or None."""
        return None

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        owner = self.declaration.owner
        if self.declaration.fields:
            self.defaults = self.declaration.bind(args, kwargs)
        else:
            self.defaults = _torch_defaults(type(self), *args, **kwargs)
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.param_groups = []
        self._make_hooks()
        self._warned_capturable_if_run_uncaptured = True
        if self.declaration.fields and self.defaults.get("fused"):
            # GradScaler then leaves it to the step to unscale, and to skip
            self._step_supports_amp_scaling = True
        given = as_groups(params, owner)
        # the caller may fill them; defaults stay what they were
        tensors = tensors_in(self.defaults)
        for group in given:
            self.add_param_group({**tensors, **group} if isinstance(group, dict) else group)
        if tensors:
            self.defaults = {key: copied(value) for key, value in self.defaults.items()}
        if len(given) == len(self.param_groups):
            for group, own in zip(given, self.param_groups, strict=True):
                group.update(own)
        if self.starts_with_state:
            self.init_state()
            self._newborn = list(self.state)

    @outside_graphs
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters; as in torch, the dict is filled with the group's values.

        Args:
            param_group: "params", and the hyperparameters that differ from the defaults

        Raises:
            TypeError, ValueError, KeyError, RuntimeError: nothing is changed
        """
        group = add_group(param_group, self.defaults, self.declaration, self.param_groups)
        self.param_groups.append(group)
        param_group.update(group)

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss and the gradients anew; its result is returned
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"{type(self).__name__}.step: closure must be a function that computes the "
                    f"loss and the gradients, got {type(closure).__name__}"
                )
            with torch.enable_grad():
                loss = closure()
        self._prepare()()
        return loss

    def _prepare(self) -> Callable[[], None]:
        """Check and read all that a step needs; call what this returns to take the step.

        Nothing has changed in between but state that was missing, so several optimizers can be
        prepared before the first of them moves.
        """
        own = vars(self)
        scaling = UNSCALED
        if "found_inf" in own or "grad_scale" in own:
            scaling = self._scaling()
            if not is_elsewhere(scaling.found_inf) and scaling.found_inf:
                return _rest
        held = self._held
        groups = own.get("param_groups")
        if groups is None:
            # of a subclass that keeps them elsewhere, or a wrapper that asks what it wraps
            groups = self.param_groups
        if (
            held is None
            or held[1] is not groups
            or held[2] is not self.state
            or not held[0].load(scaling)
        ):
            return self._prepare_anew(scaling)
        run: Callable[[], None] = held[0].run
        return run

    def _scaling(self) -> Scaling:
        """Return the scale and the overflow flag that a GradScaler has set for this step."""
        return Scaling(vars(self).get("grad_scale"), vars(self).get("found_inf"))

    def _prepare_anew(self, scaling: Scaling) -> Callable[[], None]:
        if profiler._is_profiler_enabled:
            import_unseen()
        self._check_held()
        self._drop_orphans()
        self._newborn = ()
        if self._held is None and scaling is UNSCALED and self._rehearses():
            return _rest
        if self._rehearsed:
            begin_anew(self.state, self._rehearsed)
            self._rehearsed = ()
        plan = self._make_plan(scaling)
        if not plan.load(scaling):
            raise RuntimeError(
                f"{type(self).__name__}: gradients, state or groups changed while a step was "
                "being prepared"
            )
        self._held = (plan, self.param_groups, self.state)
        return plan.run

    def _check_held(self) -> None:
        """Look at what others may have assigned to the optimizer."""
        check_groups(self.param_groups, self.declaration)
        if not isinstance(self.state, MutableMapping):
            raise TypeError(
                f"{type(self).__name__}: state must be a dict with an entry for each parameter, "
                f"got {type(self.state).__name__}"
            )

    def _rehearses(self) -> bool:
        """Make the state that this step was taken for, if it was taken for nothing else."""
        formula = self._state_formula()
        if formula is None or not is_rehearsal(self.param_groups, self.state):
            return False
        self._rehearsed = rehearse(formula, self.param_groups, self.state, self.defaults)
        return True

    def _make_plan(self, scaling: Scaling) -> Stepper:
        """Return the stepper of this rule; a rule that is no formula overrides this method."""
        if self.formula is None:
            raise NotImplementedError(f"{type(self).__name__} has neither an update nor a step")
        held = self._held
        return Plan(
            self.formula,
            self.param_groups,
            self.state,
            scaling=scaling,
            densify=self.densify,
            sparse_only=self.sparse_only,
            before=held[0] if held is not None and isinstance(held[0], Plan) else None,
            kept=self.__dict__.setdefault("_kept", []),
        )

    @staticmethod
    def profile_hook_step(func: Any) -> Any:
        """A step function with the hooks, and the label in a profile, around it."""
        return hooked(func)

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Args:
            set_to_none: drop them; otherwise they are filled with zeros
        """
        with profiled(self, "zero_grad"):
            if not set_to_none:
                self._fill_grads()
                return
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad = None

    def _fill_grads(self) -> None:
        dense: list[Tensor] = []
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.grad_fn is not None:
                    grad.detach_()
                else:
                    grad.requires_grad_(False)
                if grad.layout is torch.strided:
                    dense.append(grad)
                else:
                    grad.zero_()
        if dense:
            torch._foreach_zero_(dense)

    # State

    @outside_graphs
    def init_state(self) -> None:
        """Make the state that a first step would make, without taking one.

        For loading into sharded optimizers, which want to see what they load into, and for
        planning of memory. State that is there stays; what a rule leaves unset until its first
        step, as `SGD` its momentum, stays unset.
        """
        formula = self._state_formula()
        if formula is None:
            return
        self._check_held()
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                check_dense(type(self).__name__, param, f"group {index}")
                program = program_for(formula, group, ndim=param.dim())
                have = self.state.setdefault(param, {})
                with torch.inference_mode(False):
                    have.update(create_state(program, group, param, have))

    def _state_formula(self) -> Formula | None:
        """What declares the state, for making and loading it; None if nothing does."""
        return self.formula

    def state_bytes(self) -> int:
        """The memory that the state takes, in bytes, on all devices together."""
        tensors = map(local_part, self._state_tensors())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def share_memory(self) -> None:
        """Move the state to shared memory, for training by several processes (Hogwild)."""
        for tensor in self._state_tensors():
            tensor.share_memory_()  # type: ignore[no-untyped-call]

    def _state_tensors(self) -> list[Tensor]:
        # an entry that is no parameter's may be anything
        kept = (state for state in self.state.values() if isinstance(state, Mapping))
        return [value for state in kept for value in state.values() if isinstance(value, Tensor)]

    # Words

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            # as torch prints it, an empty line between groups included
            lines += ["", f"Parameter Group {index}"] if index else ["Parameter Group 0"]
            lines += [
                f"    {key}: {group[key]}" for key in sorted(group, key=str) if key != "params"
            ]
        if self._held is not None:
            names = dict.fromkeys(line.partition(":")[0] for line in self._held[0].describe())
            lines.append(f"Backend: {', '.join(names) or 'none, no parameter has a gradient'}")
        return "\n".join([*lines, ")"])


def _rest() -> None:
    """A step that is not taken: a GradScaler has asked for that, or it was a rehearsal."""


def _torch_defaults(cls: type[Optimizer], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return what a subclass in torch's manner passes to the base class after `params`.

    Raises:
        TypeError: it passes nothing, or something else
    """
    found: Any = args[0] if len(args) == 1 and not kwargs else kwargs.get("defaults")
    if len(args) + len(kwargs) == 1 and isinstance(found, dict):
        return found
    own = cls.__mro__[: cls.__mro__.index(Optimizer)]
    close = difflib.get_close_matches("update", [name for each in own for name in vars(each)])
    hint = f"did you mean 'update' by '{close[0]}'?" if close else "or its own __init__"
    raise TypeError(
        "Optimizer.__init__() missing 1 required positional argument: 'defaults' "
        f"({cls.__name__} has no update(param, grad, state, group), which a rule must define; "
        f"{hint})"
    )


Optimizer.declaration = Declaration("Optimizer", {}, Optimizer.check, {}, {})
