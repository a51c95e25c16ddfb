"""LBFGS: quasi-Newton steps, learnt from how the gradient changed over the last of them."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..cohort import Scaling, place_of
from ..inspection import check_dense, check_unexpanded
from ..language import Message, NonNegative, Range, Unlisted
from ..modes import as_around, is_inference, undisturbed, without_autocast
from ..optimizer import Optimizer
from ..param_groups import add_group, check_waiting
from ..plan import Stepper
from ..quasi_newton.history import History, fitted
from ..quasi_newton.line_search import Search, first_finite, leap, strong_wolfe
from ..quasi_newton.objective import Line, Objective, Point, needs_closure
from ..quasi_newton.vectors import dot, empty_vector, largest, sum_of_sizes

__all__ = ["LBFGS"]

Count = Annotated[int, Range(0)]
Tolerance = Annotated[float | Tensor, Range(endless=True)]
# what a state has from the first iteration on, beside the history
RESUMED = {"d", "t", "H_diag", "prev_flat_grad", "prev_loss"}
StrongWolfe = Annotated[Literal["strong_wolfe"], Message("only 'strong_wolfe' is supported")]


class LBFGS(Optimizer):
    """Quasi-Newton steps, learnt from how the gradient changed over the last of them.

        d <- -H g       (H maps the last changes y of the gradient to the steps s that made them)
        p <- p + t d    (t is lr, or what a search finds that starts there)

    Nocedal and Wright, Numerical Optimization, 2nd edition, chapters 3 and 7.
    Paper: Liu and Nocedal, On the Limited Memory BFGS Method for Large Scale Optimization,
    Mathematical Programming 45, 1989.

    A step calls its closure many times. Where that gives NaN or infinity, it goes less far; if
    nothing helps, the history is dropped and the gradient followed; if that does not help either,
    it warns, and the parameters stay at the last finite point. If the closure raises, they are
    left at the best point of the search.

    Distributed parameters, as those of FSDP2, move as the whole model would: every process has the
    whole history, and the loss is the mean over the processes. Where each process has all
    parameters, as in DistributedDataParallel, the closure must return that mean itself.

    Args:
        params: parameters to update, in one group
        lr: the step size, or the first that a search tries
        max_iter: how many times a step moves the parameters
        max_eval: how many calls of the closure end a step, and a search that knows a lower point;
            by default max_iter * 5 // 4
        tolerance_grad: a step ends when no element of the gradient is larger
        tolerance_change: a step ends when loss or parameters change by less
        history_size: how many pairs (s, y) are kept
        line_search_fn: "strong_wolfe", or None to take every step as it is
        maximize: climb instead of descend

    >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
    >>> optimizer = LBFGS([weight], line_search_fn="strong_wolfe")
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (weight - 1).square().sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item()  # the loss at the start, (3 - 1)^2
    4.0
    >>> round(weight.item(), 4)
    1.0
    """

    lr: NonNegative = 1
    max_iter: Count = 20
    max_eval: Count | None = None
    tolerance_grad: Tolerance = 1e-7
    tolerance_change: Tolerance = 1e-9
    history_size: Annotated[int, Range(1)] = 100
    line_search_fn: StrongWolfe | None = None
    _: KW_ONLY
    maximize: Annotated[bool, Unlisted()] = False

    _history: History | None = None
    _warned = False

    @staticmethod
    def check(group: Mapping[str, Any]) -> str | None:
        """All parameters must fit into one vector of reals."""
        params = group["params"]
        for index, param in enumerate(params):
            check_dense("LBFGS", param, f"parameter {index}")
            check_unexpanded("LBFGS", param, f"parameter {index}")
            if not (param.is_floating_point() or param.is_complex()):
                return f"parameters must be floating point or complex, got {param.dtype}"
        devices = {str(param.device) for param in params}
        if len(devices) > 1:
            return f"all parameters must be on one device, got {' and '.join(sorted(devices))}"
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group; a second is refused."""
        if self.param_groups:
            # what is wrong with it beside comes first, as in torch
            add_group(param_group, self.defaults, self.declaration, self.param_groups)
            raise ValueError(
                "LBFGS doesn't support per-parameter options (parameter groups): all parameters "
                "move together, put them in one group"
            )
        self.defaults["max_eval"] = _max_eval(self.defaults)
        super().add_param_group(param_group)

    def _make_plan(self, scaling: Scaling) -> Stepper:
        raise TypeError(needs_closure(None))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Iterate until a tolerance or a limit is reached.

        Args:
            closure: computes the loss and the gradients anew, and returns the loss

        Returns:
            what the first call of the closure returned

        Raises:
            RuntimeError: loss or gradient are not finite to begin with; nothing is changed
        """
        if not callable(closure):
            raise TypeError(needs_closure(closure))
        if len(self.param_groups) != 1:
            count = len(self.param_groups)
            raise AssertionError(f"Expected exactly one param_group, but got {count}")
        check_waiting(self.param_groups)
        params = self.param_groups[0]["params"]
        with undisturbed(is_inference(params)):
            with torch.enable_grad():
                loss = closure()
            scaling = self._scaling()
            if params and not scaling.found_inf:
                self._descend(closure, loss, scaling.grad_scale)
        return loss

    # as torch's, which has no default
    step.__signature__ = inspect.signature(torch.optim.LBFGS.step)  # type: ignore[attr-defined]

    def _descend(self, closure: Callable[[], Any], loss: Any, grad_scale: Any) -> None:
        """Iterate, from what the first call of the closure has returned."""
        group = self.param_groups[0]
        params = _unique(group["params"])
        device = params[0].device
        objective = Objective(
            params,
            as_around(closure, device),
            grad_scale=grad_scale,
            maximize=bool(group.get("maximize")),
            place=lambda index: place_of(group, 0, _index(group["params"], params[index])),
        )
        number, grad = objective.read(loss)
        steepest = _finite("gradient", largest(grad))
        point = Point(0.0, _finite("loss", number), 0.0, grad)
        state = self.state[params[0]]
        if not isinstance(state, dict):
            raise TypeError(
                f"LBFGS: the state of {place_of(group, 0, 0)} must be a dict, got "
                f"{type(state).__name__}"
            )
        state.update(func_evals=state.get("func_evals", 0), n_iter=state.get("n_iter", 0))
        try:
            if steepest > group["tolerance_grad"]:
                with without_autocast(device):
                    self._iterate(objective, group, state, point)
        finally:
            state["func_evals"] += objective.evaluations

    def _iterate(
        self, objective: Objective, group: Mapping[str, Any], state: dict[str, Any], point: Point
    ) -> None:
        history = self._recall(state, point.grad, group["history_size"])
        tolerance, max_eval = group["tolerance_change"], _max_eval(group)
        try:
            for left in reversed(range(group["max_iter"])):
                # torch's state does not say who rested
                anew = state.get("resting", objective.resting) != objective.resting
                state["resting"] = objective.resting
                start, t = _set_out(history, group, state, point, anew)
                objective.leave_resting(state["d"])
                # whatever the tolerance, there is no step without a slope
                if start.slope >= min(-tolerance, 0.0) or t == 0:
                    return
                line = Line(objective, state["d"], start, tolerance)
                search = strong_wolfe if group["line_search_fn"] else first_finite if left else leap
                budget = max(max_eval - objective.evaluations, 0) + 1
                point = _go(line, search, t, budget, state)
                is_over = objective.evaluations >= max_eval
                if point.t == 0:
                    is_over |= not self._starts_over(history, state, line)
                elif _has_settled(point, line, group):
                    is_over = True
                if is_over:
                    return
        finally:
            state.update(history.listed())

    def _starts_over(self, history: History, state: dict[str, Any], line: Line) -> bool:
        """Whether another search may help, with an empty history, after one that has failed."""
        scale = _cautious(line.start.grad)
        if history.count or state["H_diag"] > scale:
            history.clear()
            state["H_diag"] = scale
            return True
        if line.is_broken and not self._warned:
            self._warned = True
            warnings.warn(
                "LBFGS: loss or gradient are not finite anywhere along the gradient; the "
                "parameters stay at the last finite point",
                RuntimeWarning,
                stacklevel=6,
            )
        return False

    # Copies and checkpoints

    def _recall(self, state: dict[str, Any], like: Tensor, limit: int) -> History:
        """The history that belongs to a state, which may have been loaded, or replaced."""
        history = self._history
        if (
            history is None
            or state.get("inverse") is not history.inverse
            or not history.fits(like, limit)
            or not state.keys() >= RESUMED
        ):
            try:
                history = History.restored(state, like, limit)
                resumed = _resumed(state, like)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"LBFGS: this state does not fit parameters of {like.numel()} numbers in all: "
                    f"{type(error).__name__}: {error} (to begin anew, clear optimizer.state)"
                ) from error
            self._history = history
            state.pop("al", None)
            state.update(resumed, **history.listed())
        return history

    def _loaded_group(self, index: int, saved: Mapping[str, Any] | None) -> dict[str, Any]:
        groups = self.param_groups[index], saved or {}
        names = [list(group.get("param_names", ())) for group in groups]
        if all(names) and names[0] != names[1]:
            raise ValueError(
                f"LBFGS: the saved history is of the parameters {names[1]}, in this order, and not "
                f"of {names[0]}"
            )
        return super()._loaded_group(index, saved)

    def _saved_state(self) -> dict[Any, Any]:
        # the rows of the history are written to as training goes on, and pickle would save all of
        # them with a view of one
        return {key: _copied(entry) for key, entry in self.state.items()}

    def state_bytes(self) -> int:
        """The memory that state and history take, in bytes; rows set aside are counted."""
        rows = 0 if self._history is None else self._history.rows.nbytes
        return super().state_bytes() + rows

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        kept.pop("_history", None)
        return {**kept, "state": defaultdict(dict, self._saved_state())}

    def __copy__(self) -> LBFGS:
        new = type(self).__new__(type(self))
        new.__setstate__({**self.__getstate__(), "state": self.state})
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state["param_groups"][0]
        entry = state["state"].get(group["params"][0]) if group["params"] else None
        # without an iteration there is nothing to recall
        if entry and entry.get("n_iter") != 0:
            self._recall(entry, empty_vector(_unique(group["params"])), group["history_size"])
        super().__setstate__(state)

    def _take(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        """Make loaded state the optimizer's own, unless another rule has saved it."""
        first = self.param_groups[0]["params"][:1]
        for key, entry in state.items():
            is_own = any(key is param for param in first) and "n_iter" in entry
            if isinstance(key, Tensor) and entry and not is_own:
                raise ValueError(
                    "LBFGS: its state belongs to the first parameter, and counts n_iter"
                )
        super()._take(state, groups)


def _max_eval(group: Mapping[str, Any]) -> int:
    found = group["max_eval"]
    return int(group["max_iter"] * 5 // 4 if found is None else found)


def _unique(params: list[Tensor]) -> list[Tensor]:
    """A parameter that is listed twice moves once."""
    return list({id(param): param for param in params}.values())


def _index(params: list[Tensor], param: Tensor) -> int:
    return next(index for index, known in enumerate(params) if known is param)


def _finite(what: str, number: float) -> float:
    if not math.isfinite(number):
        raise RuntimeError(
            f"LBFGS: the {what} must be finite where a step starts, got {number}; parameters and "
            "state are as they were"
        )
    return number


def _set_out(
    history: History, group: Mapping[str, Any], state: dict[str, Any], point: Point, anew: bool
) -> tuple[Point, float]:
    """The start of the next search and its first `t`; its direction is put into the state.

    It begins `anew` where the history is of other parameters: some were frozen, or are no more.
    """
    grad, t = point.grad, float(group["lr"])
    state["n_iter"] += 1
    if anew or state["n_iter"] == 1:
        history.clear()
        state["H_diag"] = 1.0
        t *= _cautious(grad)
    else:
        scale = history.learn(state["d"], state["t"], state["prev_flat_grad"], grad)
        state["H_diag"] = scale or state["H_diag"]
    state.update(t=0.0, prev_flat_grad=grad, prev_loss=point.loss)
    d = state["d"] = history.direction(grad, state["H_diag"], state.get("d"))
    slope = dot(grad, d)
    if not -math.inf < slope < 0:
        # rounding has spoilt the history
        history.clear()
        state["H_diag"] = _cautious(grad)
        history.direction(grad, state["H_diag"], d)
        slope = dot(grad, d)
    return Point(0.0, point.loss, slope, grad), t


def _cautious(grad: Tensor) -> float:
    """The scale of a step of size 1 at most, where nothing is known."""
    return 1.0 / max(1.0, sum_of_sizes(grad))


def _go(line: Line, search: Search, t: float, budget: int, state: dict[str, Any]) -> Point:
    """Move to the point that a search finds, or, if it is interrupted, to its best one."""
    found: Point | None = None
    try:
        found = search(line, t, budget)
    finally:
        end = found or line.best
        line.move(end.t)
        state["t"] = end.t
    return end


def _has_settled(point: Point, line: Line, group: Mapping[str, Any]) -> bool:
    """Whether the gradient is small enough, or parameters or loss have hardly changed."""
    return bool(
        largest(point.grad) <= group["tolerance_grad"]
        or point.t <= line.shortest
        or abs(point.loss - line.start.loss) < group["tolerance_change"]
    )


def _resumed(state: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """What else a state keeps from step to step, as it is kept here."""
    if not state["n_iter"]:
        return {}
    vectors = {key: fitted(state[key], like) for key in ("d", "prev_flat_grad")}
    numbers = {key: float(state[key]) for key in ("t", "H_diag", "prev_loss")}
    resting = {"resting": tuple(map(int, state["resting"]))} if "resting" in state else {}
    return {**vectors, **numbers, **resting}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value
