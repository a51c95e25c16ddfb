"""SparseAdam: Adam for gradients that are sparse, of which it updates the rows alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..formulas import adam
from ..language import AtFirst, Decay, OwnFlag, Positive, Range, zeros
from ..language.number import is_fake
from ..optimizer import Optimizer

__all__ = ["SparseAdam"]

# a schedule may warm up from 0, or end there
Rate = Annotated[float | Tensor, Range(0), AtFirst(Range(0, open="("))]


class SparseAdam(Optimizer):
    """Adam for sparse gradients: rows that a gradient leaves out keep their value and moments.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps / sqrt(1 - b2^t))

    A step costs what the rows in the gradient cost, however large the parameter is; t counts the
    steps of the parameter, not those of a row. Rows that occur several times are added up first.

    Paper: Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv:1412.6980, without the
    decay of moments whose gradient is zero, and with eps added before the bias correction.

    Args:
        params: parameters to update, or dicts that define parameter groups
        lr: the step size
        betas: how much of each running mean survives a step
        eps: keeps the denominator above zero
        maximize: climb instead of descend
        fused: use the back-end that updates all tensors in one kernel

    >>> embedding = torch.nn.Embedding(3, 1, sparse=True)
    >>> _ = torch.nn.init.ones_(embedding.weight)
    >>> embedding(torch.tensor([2])).sum().backward()
    >>> SparseAdam(embedding.parameters(), lr=0.1).step()  # a first step has size lr
    >>> embedding.weight.flatten().tolist()
    [1.0, 1.0, 0.90000...]
    """

    lr: Rate = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    maximize: bool = False
    _: KW_ONLY
    fused: OwnFlag = None

    exp_avg = zeros()
    exp_avg_sq = zeros()

    # momentum moves a row whose gradient is zero; here it waits for the next gradient
    sparse_only: ClassVar[bool] = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize more parameters, which must be dense and real."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        problem = _unfit(index, self.param_groups[index]["params"])
        if problem is not None:
            del self.param_groups[index]
            raise ValueError(problem)

    def _saved_state(self) -> Mapping[Any, Any]:
        # torch goes on from an int without rounding 1 - b2^t
        return {
            param: {**state, "step": _whole(state["step"])} if _counts(state) else state
            for param, state in self.state.items()
        }

    @staticmethod
    def update(param: Any, grad: Any, state: Any, group: Any) -> Any:
        """The formula."""
        return adam(param, grad, state, group, corrects_eps=True)


def _counts(state: Any) -> bool:
    """Return whether this is the state of a parameter, and not an entry of other code."""
    return isinstance(state, dict) and "step" in state


def _whole(count: Any) -> Any:
    # a fake tensor has no number
    return count if isinstance(count, Tensor) and is_fake(count) else int(count)


def _unfit(group: int, params: list[Tensor]) -> str | None:
    """What is wrong with the parameters of a group, in torch's words."""
    sparse = [[group, i] for i, param in enumerate(params) if param.layout is not torch.strided]
    if sparse:
        return (
            f"Sparse params at indices {sparse}: SparseAdam requires dense parameter tensors "
            "(it is gradients that may be sparse; pass param.to_dense())"
        )
    imaginary = [[group, i] for i, param in enumerate(params) if param.is_complex()]
    if imaginary:
        return (
            f"Complex params at indices {imaginary}: SparseAdam does not support complex "
            "parameters (leave them to Adam, with dense gradients)"
        )
    return None
