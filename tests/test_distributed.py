"""Do the parts of torch.distributed that look for the class of an optimizer find ours?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stepwell
from stepwell.after_import import after_import

from .cases import PLAIN, Case, named, numbers, parameters, set_grads
from .compare import assert_same_bits
from .processes import in_processes

# what torch says of its own functional optimizers
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPES = ((5, 2), (7,))
LATER = """
import warnings; warnings.simplefilter("ignore")
import importlib, importlib.util, stepwell, sys, torch
assert "torch.distributed.optim" not in sys.modules
{first}
from torch.distributed.optim import as_functional_optim
{then}
from torch.distributed.optim.utils import as_functional_optim
print(type(as_functional_optim(stepwell.NAdam, lr=0.1)).__name__)
"""
PROBE = """
import torch.distributed
path = [f"{path}/optim" for path in torch.distributed.__path__]
[finder.find_spec("torch.distributed.optim.utils", path) for finder in sys.meta_path]
assert "torch.distributed.optim" not in sys.modules
"""
RELOAD = 'importlib.reload(sys.modules["torch.distributed.optim.utils"])'
RELOAD_OURS = """
count = len(sys.meta_path)
importlib.reload(sys.modules["stepwell.after_import"])
importlib.reload(stepwell)
assert len(sys.meta_path) == count
"""


@pytest.mark.parametrize(
    ("first", "then"),
    [("", ""), (PROBE, ""), ("", RELOAD), ("", RELOAD_OURS + RELOAD + "\n" + RELOAD)],
    ids=["imported", "looked for before", "reloaded", "both reloaded"],
)
def test_a_map_of_torchs_that_is_imported_later_is_filled_then(first: str, then: str) -> None:
    run = [sys.executable, "-c", LATER.format(first=first, then=then)]
    assert subprocess.run(run, capture_output=True, check=True, text=True).stdout == (
        "FunctionalNAdam\n"
    )


def test_after_import_of_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for a module that does not exist still says so."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for _ in range(2):
        after_import("stepwell_is_not_here", "stepwell.distributed")
        with pytest.raises(ModuleNotFoundError, match="stepwell_is_not_here"):
            __import__("stepwell_is_not_here")


def _functional(rule: type[Any], **options: Any) -> Any:
    from torch.distributed.optim import as_functional_optim

    return as_functional_optim(rule, **options)


@pytest.mark.parametrize("case", **named(PLAIN))
def test_each_rule_has_a_counterpart_that_steps_alike(case: Case) -> None:
    """It is given gradients, some of them None, and looks at none of the parameters' own."""
    ours = case.make(parameters(SHAPES, torch.float32))
    expected = ours.param_groups[0]["params"]
    together, alone = (_functional(case.rule, **case.options) for _ in range(2))
    params, others = (parameters(SHAPES, torch.float32) for _ in range(2))
    together.param_group["params"] += params
    for step in range(4):
        set_grads(expected, step)
        if step == 2:
            expected[0].grad = None
        ours.step()
        grads = [param.grad for param in expected]
        together.step(grads)
        for param, grad in zip(others, grads, strict=True):
            alone.step_param(param, grad)
    for found in (params, others):
        assert all(param.grad is None for param in found)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other, case.name)
    for param, other in zip(params, expected, strict=True):
        assert together.state[param].keys() == ours.state.get(other, {}).keys()


def test_a_parameter_may_move_to_other_memory() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = _functional(stepwell.SGD, lr=0.5, momentum=0.5)
    optimizer.step_param(param, torch.ones(3))
    param.data = torch.full((3,), 8.0)
    optimizer.step_param(param, torch.ones(3))
    assert torch.equal(param, torch.full((3,), 8 - 0.5 * 1.5))


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        _functional(stepwell.SGD, lr=-1)
    with pytest.raises(ValueError, match=r"optimizer got an empty parameter list \(FunctionalSGD"):
        type(_functional(stepwell.SGD))([])
    with pytest.raises(ValueError, match="the gradients passed in does not equal to the size"):
        _functional(stepwell.SGD).step([torch.ones(3)])


def _while_gradients_are_reduced(mesh: Any, folder: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    results = []
    for library in (torch.optim, stepwell):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        parallel = DistributedDataParallel(model)
        parallel._register_fused_optim(library.AdamW, lr=0.1)
        for step in range(3):
            parallel(numbers((5, 4), torch.float32, step)).square().mean().backward()
        results.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(*results)


def test_ddp_steps_while_it_reduces_gradients(tmp_path: Path) -> None:
    in_processes(_while_gradients_are_reduced, tmp_path)
