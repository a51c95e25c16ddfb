"""Is each row of docs/differences.md true, of torch and of us?

Every row has a function here that shows it, or, where that needs a GPU or is a test of its own
already, the name of that test.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stepwell

from .cases import NATIVE
from .compare import backends
from .differences import ARGUMENTS, ROWS, STATE, TYPES
from .shell_cases import fill_grads, named_weights, ours, refused, theirs, train, weights
from .torch_versions import INSTALLED

ZERO = torch.tensor(0.0)

SHOWN: dict[str, Callable[[], None]] = {}

ELSEWHERE = {
    "a capture in which state would be made, or gradients, groups or flags are new": (
        "test_cuda",
        "test_captures_that_are_refused",
    ),
    "`Adagrad` and others without `capturable`, captured": (
        "test_cuda",
        "test_captures_that_are_refused",
    ),
    "a Tensor rate on an accelerator with `capturable=False`": ("test_cuda", "test_no_step_waits"),
    "`load_state_dict`: hyperparameters that are tensors": (
        "test_state_dict",
        "test_hyperparameters_stay_on_their_device",
    ),
    "functional counterparts in `torch.distributed.optim`": (
        "test_distributed",
        "test_each_rule_has_a_counterpart_that_steps_alike",
    ),
    "`torch.compile` around a step": ("test_compile", "test_a_training_step_under_torch_compile"),
    "`param_groups` in code under `torch.compile`": (
        "test_compile",
        "test_compiled_code_with_groups",
    ),
    "groups that are put into `param_groups` by hand": (
        "test_groups_by_hand",
        "test_a_wrong_group_is_refused_and_nothing_moves",
    ),
    "`torch.distributed.checkpoint` before the first step": (
        "test_distributed_checkpoint",
        "test_to_ask_before_the_first_step_is_no_step",
    ),
    "flat state dicts of `torch.distributed.checkpoint` (`flatten_optimizer_state_dict=True`), "
    "loaded into groups with an argument that torch's class lacks, such as `RMSprop(fused=True)`": (
        "test_distributed_checkpoint",
        "test_flat_state_dicts_that_lack_a_key_of_the_groups",
    ),
    "numbers of numpy as hyperparameters": (
        "test_pickle",
        "test_files_of_what_an_optimizer_shows_run_no_code",
    ),
    "`Muon`, the precision of its products": ("test_muon", "test_what_a_device_iterates_in"),
    '`state["step"]` of `SparseAdam`': ("test_sparse", "test_the_count_of_steps"),
    "indices of a sparse gradient that are out of range": (
        "test_sparse",
        "test_rows_that_do_not_exist",
    ),
    "a sparse gradient that says it is coalesced, and has rows twice": (
        "test_sparse",
        "test_a_gradient_that_says_it_is_coalesced_and_is_not",
    ),
    "`Muon`, parameters of more than two dimensions": (
        "test_muon",
        "test_convolutions_are_matrices_of_out_channels_and_the_rest",
    ),
    "`LBFGS`: loss or gradient that are not finite along a step": (
        "test_lbfgs",
        "test_a_search_turns_back_where_the_loss_is_no_number",
    ),
    "`LBFGS` in `torch.autocast`": ("test_lbfgs_modes", "test_autocast_sees_where_parameters_are"),
    "`LBFGS` on distributed parameters: the loss": ("test_lbfgs_sharded", "test_shards"),
    "`LBFGS`: a closure that raises within a search": (
        "test_lbfgs",
        "test_a_closure_that_raises_leaves_the_best_point",
    ),
    "averages of whole numbers by `get_swa_multi_avg_fn`": (
        "test_swa_utils",
        "test_whole_numbers_are_averaged",
    ),
    "averages of whole numbers by other functions": (
        "test_swa_utils",
        "test_whole_numbers_are_averaged",
    ),
    "`AveragedModel` in half precision": (
        "test_swa_utils",
        "test_averages_in_half_precision_go_on_moving",
    ),
    "`state_dict()` of an `AveragedModel` in half precision, or with averaged whole numbers": (
        "test_exact_averages",
        "test_a_resumed_average_goes_on_to_the_bit",
    ),
    "`AveragedModel` of another dtype than the model": (
        "test_swa_utils",
        "test_a_model_of_another_precision",
    ),
    "`AveragedModel`, buffers that overlap in memory": (
        "test_swa_utils",
        "test_buffers_that_overlap_are_averaged_once",
    ),
    "`AveragedModel`, truth values among buffers": (
        "test_swa_utils",
        "test_truth_values_are_copied",
    ),
    "`update_parameters` with a model of other parameters": (
        "test_swa_utils",
        "test_another_model_is_refused_before_anything_changes",
    ),
    "`update_parameters`": (
        "test_swa_utils",
        "test_an_update_does_not_look_at_the_count",
    ),
    "`update_bn`: modes of modules": (
        "test_swa_utils",
        "test_modes_and_momenta_are_put_back",
    ),
    "`update_bn`: statistics in half precision": (
        "test_swa_utils",
        "test_statistics_in_half_precision_go_on_moving",
    ),
    "`update_bn`: an empty loader, or an error on the way": (
        "test_swa_utils",
        "test_modes_and_momenta_are_put_back",
    ),
    "a schedule of torch's that leads a rate below zero, as a linear `OneCycleLR` one step after "
    "its end": (
        "test_schedule_refusals",
        "test_what_torchs_schedules_leave_is_refused_by_the_step_that_would_use_it",
    ),
    "schedules: a rate that a second schedule has led below the floor of the first": (
        "test_schedule_refusals",
        "test_two_cosines_that_are_stepped_by_hand",
    ),
    "schedules: `optimizer.step` was replaced by something that is not the optimizer's": (
        "test_lr_scheduler",
        "TestOrderOfSteps",
    ),
    "`OneCycleLR`, loaded with the state of a shorter cycle than the constructor's": (
        "test_schedule_states",
        "TestOneCycleThatIsExtended",
    ),
    "`OneCycleLR`, loaded with a state whose `total_steps` was changed": (
        "test_schedule_states",
        "TestOneCycleThatIsExtended",
    ),
    "schedule state with entries of the wrong type": (
        "test_schedule_states",
        "test_entries_of_the_wrong_kind",
    ),
    "schedules: a rate that nobody else touches": (
        "test_schedule_twins",
        "test_ours_is_the_closed_form_to_the_bit_at_every_step",
    ),
    "schedules: a rate changed by hand where the factor is zero": (
        "test_schedule_groups",
        "test_a_rate_changed_by_hand_where_the_factor_is_zero",
    ),
    "schedules: one that is made after its optimizer was loaded, and then loaded": (
        "test_schedule_groups",
        "test_a_loaded_rate_survives_the_constructor",
    ),
    "`OneCycleLR` and `SWALR`, made after their optimizer was loaded, and then loaded": (
        "test_schedule_resume",
        "test_arguments_that_were_loaded_win",
    ),
    "schedules: `load_state_dict` without the optimizer's": (
        "test_schedule_groups",
        "test_the_state_of_a_schedule_alone_brings_its_rates",
    ),
    'schedules: `load_state_dict({"last_epoch": 700})`': (
        "test_schedule_resume",
        "test_without_the_optimizers_state_too",
    ),
    "schedules: groups that share a Tensor of the constructor's, and are led to different values": (
        "test_schedule_groups",
        "test_groups_that_share_a_tensor_are_led_each_by_itself",
    ),
    "a group that is added to an optimizer whose constructor was given Tensors": (
        "test_schedule_groups",
        "test_a_group_that_is_added_starts_with_what_the_constructor_was_given",
    ),
    "schedules: a group that joins `LambdaLR` and others": (
        "test_schedule_groups",
        "test_a_group_joins_with_its_own_rate",
    ),
    "`ReduceLROnPlateau` with a list of floors: a group that joins": (
        "test_schedule_groups",
        "test_a_floor_for_each_group_of_a_plateau_is_no_obstacle",
    ),
    "`ReduceLROnPlateau`: a metric that is NaN": (
        "test_schedule_refusals",
        "test_a_metric_that_is_nan_is_reported_and_no_better",
    ),
    "`SequentialLR(last_epoch=...)`": (
        "test_schedule_groups",
        "test_a_sequence_resumes_where_it_stood",
    ),
    "`SequentialLR` inside another one": (
        "test_schedule_groups",
        "test_a_sequence_of_sequences",
    ),
    "`ChainedScheduler` with a `CosineAnnealingLR` that rises from zero": (
        "test_schedule_groups",
        "test_a_chain_after_a_value_of_zero_keeps_both_factors",
    ),
    "`ConstantLR(factor=0)`": (
        "test_schedule_refusals",
        "test_a_constant_factor_of_zero_comes_back",
    ),
    "`OneCycleLR`, one step after its last": (
        "test_schedule_refusals",
        "test_one_cycle_after_its_end",
    ),
    "schedules: `total_iters` of zero, milestones out of order, NaN": (
        "test_schedule_refusals",
        "test_what_torch_lets_pass",
    ),
    "schedules: `last_epoch=N` in the constructor, on an optimizer that has taken and loaded no "
    "step": (
        "test_schedule_resume",
        "test_a_fresh_optimizer_is_moved_to_its_step",
    ),
    "`from torch.optim.lr_scheduler import *`": (
        "test_lr_scheduler",
        "test_a_star_brings_torchs_names_and_ours",
    ),
    "schedules: a step that fails": (
        "test_schedule_refusals",
        "test_a_rate_out_of_range_changes_nothing",
    ),
    "schedules: the first step, where a `GradScaler` held the optimizer back": (
        "test_lr_scheduler",
        "TestOrderOfSteps",
    ),
}


def shows(where: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Marks the function that shows the row with this first cell."""

    def mark(function: Callable[[], None]) -> Callable[[], None]:
        SHOWN[where] = function
        return function

    return mark


# rows that test_parity.py reads: it compares what they list
READ = [where for where in ROWS if where.split()[0] in ("argument", "arguments", "state", "type")]
assert len(READ) == len(set(READ)) >= 1


@pytest.mark.parametrize("where", ROWS)
def test_a_row_is_true(where: str) -> None:
    if where in SHOWN:
        SHOWN[where]()
    elif where in ELSEWHERE:
        module, name = ELSEWHERE[where]
        assert hasattr(importlib.import_module(f".{module}", __package__), name)
    else:
        assert where in READ, "no test shows this row: add a function to tests/test_differences.py"


def test_nothing_is_shown_that_the_page_does_not_say() -> None:
    assert SHOWN.keys() | ELSEWHERE.keys() <= ROWS.keys()


def test_rows_that_are_read_name_what_there_is() -> None:
    for owner in (
        *STATE,
        *TYPES,
        *(name for name, more in ARGUMENTS.items() if more and name[0].isupper()),
    ):
        assert hasattr(torch.optim, owner) or hasattr(torch.optim.lr_scheduler, owner)


def both(call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What a call answers with torch's package, and with ours."""
    return call(torch.optim), call(stepwell)


def param(*shape: int, value: float = 1.0, **kind: Any) -> Any:
    return torch.nn.Parameter(torch.full(shape, value, **kind))


def stepped(optimizer: Any, *grads: Any) -> Any:
    """The optimizer after a step with these gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, grads or map(torch.ones_like, params), strict=True):
        p.grad = grad
    optimizer.step()
    return optimizer


def one_row(shape: tuple[int, int] = (5, 2)) -> Tensor:
    """A sparse gradient."""
    return torch.sparse_coo_tensor([[1]], torch.ones(1, shape[1]), shape, check_invariants=True)


# What runs


@shows("implementation, if none is asked for")
def _() -> None:
    plain, loop = (stepped(torch.optim.Adam([param(9)], foreach=f)) for f in (None, False))
    assert torch.equal(*(o.param_groups[0]["params"][0] for o in (plain, loop)))
    assert backends(stepped(stepwell.Adam([param(9)]))) == {NATIVE}


@shows("`foreach=False` or `fused=False`")
def _() -> None:
    for flag in ("foreach", "fused"):
        assert backends(stepped(stepwell.Adam([param(9)], **{flag: False}))) == {"eager"}


@shows("half precision")
def _() -> None:
    # 1 + 2**-9 is none of bfloat16's numbers: torch rounds it to 1 before it adds 2**-8
    def moved(library: Any) -> float:
        p = param(1, dtype=torch.bfloat16)
        stepped(library.SGD([p], lr=1.0, weight_decay=2**-9), torch.full_like(p, -(2**-7)))
        return p.item()

    exact = 1 - (2**-9 - 2**-7)
    theirs_, ours_ = both(moved)
    assert abs(ours_ - exact) <= abs(theirs_ - exact)
    assert backends(stepped(stepwell.SGD([param(9, dtype=torch.float16)]))) == {NATIVE}


@shows("fused `SGD`, bfloat16 and float16, on a CPU")
def _() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        p, q = (param(64, dtype=dtype) for _ in range(2))
        stepped(torch.optim.SGD([p], lr=0.5, fused=True))
        stepped(stepwell.SGD([q], lr=0.5, fused=True))
        assert bool((p == 1).any()) == (INSTALLED < (2, 14))
        assert bool((q == 0.5).all())


@shows("`fused=True` with sparse gradients or complex parameters")
def _() -> None:
    assert "sparse" in str(
        refused(lambda: stepped(torch.optim.SGD([param(5, 2)], fused=True), one_row()))
    )
    stepped(stepwell.SGD([param(5, 2)], fused=True), one_row())
    z = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    said = str(refused(lambda: stepped(torch.optim.Adam([z], fused=True))))
    assert said.startswith("`fused=True` requires all the params to be floating point Tensors")
    stepped(stepwell.Adam([z], fused=True))


@shows("a Tensor rate, or Tensor betas, with `foreach=True`")
def _() -> None:
    for options in (
        {"lr": torch.tensor(0.1)},
        {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    ):
        for name in ("Adam", "AdamW"):
            error = refused(lambda n=name, o=options: theirs(n)(weights(), foreach=True, **o))
            assert "not supported for capturable=False and foreach=True" in str(error)
            stepped(ours(name)([param(3)], foreach=True, **options))


@shows("`foreach=True` with `differentiable=True`")
def _() -> None:
    def through(library: Any) -> Any:
        leaf = torch.ones(3, requires_grad=True)
        return stepped(library.Adam([leaf.clone()], foreach=True, differentiable=True))

    assert str(refused(lambda: through(torch.optim))) == "_foreach ops don't support autograd"
    assert through(stepwell).param_groups[0]["params"][0].grad_fn is not None


@shows("`amsgrad` or momentum with `differentiable=True` over several steps")
def _() -> None:
    def pulled(library: Any, name: str, **options: Any) -> Any:
        grad = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        params = [torch.ones(3, dtype=torch.float64, requires_grad=True).clone()]
        optimizer = getattr(library, name)(params, lr=0.1, differentiable=True, **options)
        for _ in range(3):
            params[0].grad = grad * 1
            optimizer.step()
        params[0].sum().backward()
        return grad.grad

    # p = 1 - 0.1 (g + 1.9 g + 2.71 g)
    torch.testing.assert_close(
        pulled(stepwell, "SGD", momentum=0.9), torch.full((3,), -0.561, dtype=torch.float64)
    )
    assert float(pulled(torch.optim, "SGD", momentum=0.9)[0]) != pytest.approx(-0.561)
    assert pulled(stepwell, "Adam", amsgrad=True) is not None
    assert type(refused(lambda: pulled(torch.optim, "Adam", amsgrad=True))) is RuntimeError


@shows("`repr` of an optimizer that has taken a step")
def _() -> None:
    before, after = both(lambda lib: repr(stepped(lib.SGD([param(3)]))))
    assert after == before[:-1] + f"Backend: {NATIVE}\n)"


# What is refused, and what is taken


@shows("NaN or infinity for a hyperparameter")
def _() -> None:
    for key in ("lr", "momentum", "dampening", "weight_decay"):
        torch.optim.SGD(weights(), **{key: math.nan})
        assert type(refused(lambda k=key: stepwell.SGD(weights(), **{k: math.nan}))) is ValueError
    for name in ("Adam", "Rprop", "ASGD"):
        theirs(name)(weights(), lr=math.inf)
        assert "Invalid learning rate: inf" in str(
            refused(lambda n=name: ours(n)(weights(), lr=math.inf))
        )


@shows("hyperparameters that torch takes unchecked")
def _() -> None:
    taken: list[tuple[str, dict[str, Any]]] = [
        ("Muon", {"eps": -1.0}),
        ("Muon", {"ns_coefficients": (1, 2)}),
        ("Muon", {"ns_steps": 100}),
        ("Adamax", {"betas": (0.9, 0.9, 0.9)}),
        ("SGD", {"maximize": None}),
        ("SGD", {"nesterov": 2, "momentum": 0.9}),
    ]
    for name, options in taken:
        theirs(name)([param(3, 3)], **options)
        error = refused(lambda n=name, o=options: ours(n)([param(3, 3)], **o))
        assert type(error) in (TypeError, ValueError)
        assert name in str(error)


@shows("a hyperparameter that is no number, or no pair")
def _() -> None:
    for options in ({"lr": "x"}, {"lr": None}, {"betas": 0.9}, {"betas": (0.9,)}):
        error = refused(lambda o=options: theirs("Adam")(weights(), **o))
        # Python's words
        assert not str(error).startswith("Invalid")
        assert str(refused(lambda o=options: ours("Adam")(weights(), **o))).startswith("Invalid")


@shows("betas of which only one is a Tensor")
def _() -> None:
    mixed = (0.9, torch.tensor(0.9))
    words = "betas must be either both floats or both Tensors"
    assert str(refused(lambda: theirs("Adam")(weights(), betas=mixed))) == words
    for name in ("Adamax", "NAdam", "RAdam"):
        theirs(name)(weights(), betas=mixed)
        said = str(refused(lambda n=name: ours(n)(weights(), betas=mixed)))
        assert said.startswith(words)


@shows("`betas=(0, 0.9)`")
def _() -> None:
    for name in ("Adam", "AdamW"):
        said = str(refused(lambda n=name: theirs(n)(weights(), betas=(0, 0.9))))
        assert said == "betas must be either both floats or both Tensors"
        assert ours(name)(weights(), betas=(0, 0.9)).defaults["betas"] == (0, 0.9)


@shows("a flag given as 0, 1 or a numpy bool")
def _() -> None:
    for value in (1, np.True_):
        kept = both(lambda lib, v=value: lib.Adam(weights(), amsgrad=v).param_groups[0]["amsgrad"])
        assert kept[0] is value
        assert kept[1] is True


@shows("values in a parameter group")
def _() -> None:
    groups = [{"params": weights(), "lr": -1.0}]
    optimizer = torch.optim.SGD(list(map(dict, groups)))
    optimizer.param_groups[0]["lr"] = math.nan
    assert "Invalid learning rate: -1.0" in str(refused(lambda: stepwell.SGD(groups)))
    group = stepwell.SGD(weights()).param_groups[0]
    assert "Invalid learning rate: nan" in str(refused(lambda: group.update(lr=math.nan)))
    names = [{"params": weights(), "param_names": ["a"]}]
    torch.optim.SGD(list(map(dict, names)))
    assert "1 param_names for 3 params" in str(refused(lambda: stepwell.SGD(names)))


@shows('`group["weight_decy"]`')
def _() -> None:
    group = {"params": weights(), "weight_decy": 0.1}
    assert torch.optim.SGD([dict(group)]).param_groups[0]["weight_decy"] == 0.1
    assert "did you mean 'weight_decay'?" in str(refused(lambda: stepwell.SGD([group])))
    for key in ("name", "lr_scale"):
        assert stepwell.SGD([{"params": weights(), key: 3}]).param_groups[0][key] == 3


@shows("a bare set of parameters")
def _() -> None:
    kinds = (FutureWarning,) if INSTALLED >= (2, 15) else ()
    words = []
    for library, expected in ((torch.optim, kinds), (stepwell, (FutureWarning,))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            library.SGD(set(weights()))
        assert tuple(warning.category for warning in caught) == expected
        words += [str(warning.message) for warning in caught]
    assert caught[0].filename == __file__
    assert words[-1].startswith(words[0])


@shows("`ASGD`: negative `lambd` or `alpha`")
def _() -> None:
    for key in ("lambd", "alpha"):
        if INSTALLED < (2, 15):
            torch.optim.ASGD(weights(), **{key: -1.0})
        said = str(refused(lambda k=key: stepwell.ASGD(weights(), **{k: -1.0})))
        assert said.startswith(f"Invalid {key} value: -1.0")


@shows("a Tensor rate that was changed in place to NaN")
def _() -> None:
    for library in (torch.optim, stepwell):
        p, rate = param(3), torch.tensor(0.1)
        optimizer = stepped(library.SGD([p], lr=rate))
        rate.fill_(math.nan)
        if library is stepwell:
            before = p.detach().clone()
            assert "learning rate: nan" in str(refused(lambda o=optimizer: stepped(o)))
            assert torch.equal(p, before)
        else:
            stepped(optimizer)
            assert bool(p.isnan().all())


@shows("a schedule that rounds a rate past the end of its range, by less than 1e-12")
def _() -> None:
    def ended(library: Any) -> float:
        optimizer = library.SGD(weights(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, 4)
        for _ in range(6):
            optimizer.step()
            schedule.step()
        return float(optimizer.param_groups[0]["lr"])

    past, end = both(ended)
    assert -1e-12 < past < 0
    assert end == 0


@shows("an expanded parameter")
def _() -> None:
    for library in (torch.optim, stepwell):
        first, expanded = param(4), torch.nn.Parameter(torch.ones(1).expand(4))
        optimizer = library.Adam([first, expanded])
        words = "unsupported operation: more than one element of the written-to tensor"
        assert str(refused(lambda o=optimizer: stepped(o))).startswith(words)
        assert bool((first == 1).all()) is (library is stepwell)


@shows("a parameter of whole numbers")
def _() -> None:
    one, other = (
        refused(lambda lib=lib: stepped(lib.Adam([torch.ones(3, dtype=torch.int32)])))
        for lib in (torch.optim, stepwell)
    )
    assert "Int" in str(one)
    assert "updates floating point and complex parameters" in str(other)


@shows("state that is not a dict, of the wrong shape, or sparse")
def _() -> None:
    for library in (torch.optim, stepwell):
        params = [param(4), param(4)]
        optimizer = stepped(library.Adam(params))
        before = params[0].detach().clone()
        optimizer.state[params[1]]["exp_avg"] = torch.ones(3)
        refused(lambda o=optimizer: stepped(o))
        assert torch.equal(params[0], before) is (library is stepwell)


@shows("messages of `AdamW`")
def _() -> None:
    one, other = (
        refused(lambda lib=lib: stepped(lib.AdamW([param(5, 2)]), one_row()))
        for lib in (torch.optim, stepwell)
    )
    assert str(one).startswith("Adam does not support sparse gradients")
    assert str(other).startswith("AdamW does not support sparse gradients")


@shows("`capturable=True` where nothing can be captured")
def _() -> None:
    for name in ("Adam", "Adadelta", "NAdam", "ASGD"):
        one, other = (
            refused(lambda lib=lib, n=name: stepped(getattr(lib, n)([param(3)], capturable=True)))
            for lib in (torch.optim, stepwell)
        )
        assert type(one) is type(other) is AssertionError
        assert str(one).startswith("If capturable=True, params")
        words = "If capturable=True, params and state_steps must be on supported devices: ["
        assert str(other).startswith(words)


# Sparse gradients


@shows('`state["momentum_buffer"]` of `SGD` under sparse gradients')
def _() -> None:
    def kept(library: Any) -> Any:
        p = param(5, 2)
        return stepped(library.SGD([p], momentum=0.9), one_row()).state[p]["momentum_buffer"]

    one, other = both(kept)
    assert one.is_sparse
    assert torch.equal(other, one.to_dense())


@shows("`SGD` or `Adagrad` with weight decay and sparse gradients")
def _() -> None:
    for name in ("SGD", "Adagrad"):
        assert "sparse" in str(
            refused(lambda n=name: stepped(theirs(n)([param(5, 2)], weight_decay=0.1), one_row()))
        )
        sparse, dense = param(5, 2), param(5, 2)
        stepped(ours(name)([sparse], weight_decay=0.1), one_row())
        stepped(theirs(name)([dense], weight_decay=0.1), one_row().to_dense())
        torch.testing.assert_close(sparse, dense)


@shows("a sparse parameter")
def _() -> None:
    for library in (torch.optim, stepwell):
        optimizer = library.SGD([torch.nn.Parameter(one_row())], lr=0.5)
        if library is stepwell:
            error = refused(lambda o=optimizer: stepped(o, one_row()))
            assert str(error).startswith("SGD updates dense parameters, got layout torch.sparse_")
        else:
            p = stepped(optimizer, one_row()).param_groups[0]["params"][0]
            assert p.to_dense()[:, 0].tolist() == [0, 0.5, 0, 0, 0]


@shows("a gradient that aliases another parameter's memory from a later step on")
def _() -> None:
    """`Adafactor`, whose sums over a gradient come before any update."""

    def moved(library: Any, *, later: bool = True, **options: Any) -> Tensor:
        first, second = (
            torch.nn.Parameter(values) for values in torch.randn(2, 4, 4, generator=draw())
        )
        optimizer = library.Adafactor([first, second], lr=0.1, **options)
        first.grad, second.grad = torch.randn(2, 4, 4, generator=draw())
        if later:
            optimizer.step()
        second.grad = first.data
        optimizer.step()
        return second.detach()

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    expected = moved(torch.optim)
    torch.testing.assert_close(moved(stepwell, fused=False), expected)
    assert not torch.allclose(moved(stepwell), expected)
    torch.testing.assert_close(moved(stepwell, later=False), moved(torch.optim, later=False))


# Scalers


@shows("a first step of fused `SGD` with momentum that a `GradScaler` skips")
def _() -> None:
    def kept(library: Any) -> Any:
        p = param(64)
        optimizer = library.SGD([p], momentum=0.9, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        return stepped(optimizer, torch.full_like(p, math.inf)).state[p]

    one, other = both(kept)
    assert list(one) == ["momentum_buffer"]
    assert not other


@shows("`grad_scale` and `found_inf` of an optimizer that is not fused")
def _() -> None:
    for library in (torch.optim, stepwell):
        p = param(3)
        optimizer = library.SGD([p], lr=1.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        if library is stepwell:
            stepped(optimizer)
            assert p.tolist() == [0.5] * 3
        else:
            error = refused(lambda o=optimizer: stepped(o))
            assert str(error) == "Expected grad_scale and found_inf to be None"


@shows("`deepcopy` and `pickle`")
def _() -> None:
    one, other = both(lambda lib: copy.deepcopy(lib.SGD(weights(), fused=True)))
    assert not hasattr(one, "_step_supports_amp_scaling")
    assert other._step_supports_amp_scaling


# Rules


@shows("`RMSprop(centered=True)`, where rounding makes the variance negative")
def _() -> None:
    def steady(library: Any) -> Tensor:
        p = param(4000)
        optimizer = library.RMSprop([p], lr=0.01, alpha=0.5, centered=True, foreach=False)
        grad = torch.rand(4000, generator=torch.Generator().manual_seed(0))
        for _ in range(60):
            stepped(optimizer, grad)
        return p

    one, other = both(steady)
    assert bool(one.isnan().any())
    assert not other.isnan().any()


@shows("`NAdam` in float64")
def _() -> None:
    for library in (torch.optim, stepwell):
        p = param(1, dtype=torch.float64)
        optimizer = library.NAdam([p], lr=0.1)
        for _ in range(2):
            stepped(optimizer)
        assert optimizer.state[p]["mu_product"].dtype is torch.float32
        # the formula, by hand; the products of the first step are kept in float32
        mu = [0.9 * (1 - 0.5 * 0.96 ** (t * 4e-3)) for t in range(4)]
        m, v, exact, product = 0.0, 0.0, 1.0, 1.0
        for t in (1, 2):
            m, v = 0.9 * m + 0.1, 0.999 * v + 1e-3
            product *= mu[t]
            denom = math.sqrt(v / (1 - 0.999**t)) + 1e-8
            exact -= 0.1 * (1 - mu[t]) / (1 - product) / denom
            exact -= 0.1 * mu[t + 1] / (1 - product * mu[t + 1]) * m / denom
            product = float(torch.tensor(product))
        assert (abs(p.item() - exact) < 1e-12) is (library is stepwell)


@shows("`ASGD`: `step`, `eta` and `mu`")
def _() -> None:
    def homes(library: Any, **flags: Any) -> set[str]:
        p = param(3, device="meta")
        optimizer = library.ASGD([p], **flags)
        # torch's step then reads them, which no number on this device allows
        with suppress(RuntimeError):
            stepped(optimizer)
        state = optimizer.state[p]
        return {state[name].device.type for name in ("step", "eta", "mu")}

    assert homes(torch.optim) == {"meta"}
    assert homes(stepwell) == {"cpu"}


@shows("`Muon`, a parameter of one dimension in a group that is added")
def _() -> None:
    added = {"params": [param(3)]}
    words = "Muon only supports 2D parameters whereas we found a parameter with size"
    torch.optim.Muon([param(3, 3)]).add_param_group(dict(added))
    error = refused(lambda: stepwell.Muon([param(3, 3)]).add_param_group(added))
    assert str(error).startswith(words)


def quadratic(*params: Any, at: float = 3.0) -> Callable[[], Tensor]:
    """A closure; its loss is least where every parameter is `at`."""

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = torch.stack([(p - at).square().sum() for p in params]).sum()
        loss.backward()
        return loss

    return closure


@shows("`LBFGS`: loss or gradient that are not finite where a step starts")
def _() -> None:
    for library in (torch.optim, stepwell):
        p = param(2)
        optimizer = library.LBFGS([p])
        closure = quadratic(p, at=math.nan)
        if library is stepwell:
            assert type(refused(lambda o=optimizer, c=closure: o.step(c))) is RuntimeError
            assert p.tolist() == [1, 1]
        else:
            optimizer.step(closure)
            assert bool(p.isnan().all())


@shows("`LBFGS`: a search for which `max_eval` leaves no evaluation, as with `max_iter=1`")
def _() -> None:
    def moved(library: Any) -> bool:
        p = param(2)
        optimizer = library.LBFGS([p], max_iter=1, lr=10, line_search_fn="strong_wolfe")
        for _ in range(3):
            optimizer.step(quadratic(p))
        return bool((p != 1).all())

    assert both(moved) == (False, True)


@shows("`LBFGS`: `pickle` and `deepcopy`")
def _() -> None:
    def error_of_a_copy(library: Any) -> Exception | None:
        twin = copy.deepcopy(library.LBFGS([param(2)]))
        try:
            twin.step(quadratic(*twin.param_groups[0]["params"]))
        except AttributeError as error:
            return error
        return None

    one, other = both(error_of_a_copy)
    assert "_params" in str(one)
    assert other is None


@shows("`LBFGS`: tensors of `state_dict()`")
def _() -> None:
    def is_live(library: Any) -> bool:
        p = param(2)
        optimizer = library.LBFGS([p], max_iter=2)
        optimizer.step(quadratic(p))
        return bool(optimizer.state_dict()["state"][0]["d"] is optimizer.state[p]["d"])

    assert both(is_live) == (True, False)


@shows("`LBFGS`: sums over half precision")
def _() -> None:
    # 1 / (the sum of the gradient's sizes) is the first step; float16 holds no sum of 70,000
    def step(library: Any) -> Tensor:
        p = param(70_000, value=0.0, dtype=torch.float16)
        library.LBFGS([p], max_iter=1).step(lambda: setattr(p, "grad", torch.ones_like(p)) or ZERO)
        return p.detach()

    one, other = both(step)
    assert bool((one == 0).all())
    assert bool((other != 0).all())


@shows('`LBFGS(line_search_fn="weak_wolfe")`')
def _() -> None:
    p = param(2)
    optimizer = torch.optim.LBFGS([p], line_search_fn="weak_wolfe")
    late = refused(lambda: optimizer.step(quadratic(p)))
    error = refused(lambda: stepwell.LBFGS([p], line_search_fn="weak_wolfe"))
    assert type(late) is RuntimeError
    assert type(error) is ValueError
    assert str(error).startswith(str(late))


@shows("`LBFGS`: a parameter that is listed twice")
def _() -> None:
    def moved(library: Any) -> float:
        p = param(1)
        library.LBFGS([p, p], lr=0.1, max_iter=1).step(quadratic(p))
        return p.item() - 1

    with pytest.warns(UserWarning, match="duplicate parameters"):
        one, other = both(moved)
    # the gradient is -4: the first step is lr / 4 (torch: 8, and twice) times that
    assert other == pytest.approx(0.1)
    assert one == pytest.approx(2 * 0.1 / 2)


@shows("argument `maximize` of `LBFGS`")
def _() -> None:
    p = param(2)
    if "maximize" not in inspect.signature(torch.optim.LBFGS).parameters:
        error = refused(lambda: torch.optim.LBFGS([p], maximize=True))
        assert "unexpected keyword argument 'maximize'" in str(error)
    optimizer = stepwell.LBFGS([p], maximize=True)
    assert optimizer.param_groups[0]["maximize"] is True
    before = quadratic(p)().item()
    optimizer.step(quadratic(p))
    assert quadratic(p)().item() > before


@shows("`LBFGS` with a group without parameters")
def _() -> None:
    optimizer = torch.optim.LBFGS([{"params": []}])
    if "maximize" not in optimizer.defaults:
        assert type(refused(lambda: optimizer.step(lambda: ZERO))) is IndexError
    assert stepwell.LBFGS([{"params": []}]).step(lambda: ZERO) is ZERO


@shows("`LBFGS`: a gradient of another shape than its parameter")
def _() -> None:
    for library in (torch.optim, stepwell):
        p = param(2, 3)
        optimizer = library.LBFGS([p])

        def closure(p: Any = p) -> Tensor:
            p.data = p.grad = torch.ones(2, 3)
            p.data = torch.ones(3, 2)
            return ZERO

        if library is stepwell:
            found = refused(lambda o=optimizer, c=closure: o.step(c))
            words = "LBFGS: the gradient of group 0, parameter 0 is torch.float32 of shape (2, 3)"
            assert words in str(found)
        else:
            optimizer.step(closure)


@shows('`Muon(adjust_lr_fn="spectral_unclamped")`')
def _() -> None:
    flag = {"adjust_lr_fn": "spectral_unclamped"}
    if "maximize" not in inspect.signature(torch.optim.LBFGS).parameters:
        assert "is not supported" in str(refused(lambda: torch.optim.Muon([param(2, 3)], **flag)))
    moves = []
    for options in ({}, flag):
        p = param(2, 8)
        grad = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
        stepped(stepwell.Muon([p], lr=0.1, weight_decay=0.0, **options), grad)
        moves.append(p.detach() - 1)
    torch.testing.assert_close(moves[1], moves[0] * math.sqrt(2 / 8))


@shows("`Muon(nesterov=False)` in bfloat16")
def _() -> None:
    def kept(library: Any) -> Tensor:
        p = param(2, 8, dtype=torch.bfloat16)
        optimizer = library.Muon([p], momentum=0.5, nesterov=False)
        return stepped(optimizer, torch.full_like(p, 4.0)).state[p]["momentum_buffer"]

    one, other = both(kept)
    assert bool((other == 2).all())
    if "functional" not in torch.optim.__all__:
        assert float(one.norm()) == pytest.approx(1, rel=1e-2)


@shows("`LBFGS`: a saved state of named parameters in another order")
def _() -> None:
    def saved(library: Any) -> Any:
        optimizer = library.LBFGS(named_weights("a b"))
        optimizer.step(quadratic(*optimizer.param_groups[0]["params"]))
        return optimizer.state_dict()

    torch.optim.LBFGS(named_weights("b a")).load_state_dict(saved(torch.optim))
    error = refused(lambda: stepwell.LBFGS(named_weights("b a")).load_state_dict(saved(stepwell)))
    assert "in this order" in str(error)


@shows("`Adafactor` with parameters of several precisions")
def _() -> None:
    def moved(library: Any, *before: Any) -> float:
        p = param(1, dtype=torch.float64)
        stepped(
            library.Adafactor([*before, p], foreach=False),
            *(1e-4 * q.detach() for q in (*before, p)),
        )
        return p.item()

    half = [param(1, dtype=torch.bfloat16) for _ in range(2)]
    one, other = (
        (moved(lib), moved(lib, q)) for lib, q in zip((torch.optim, stepwell), half, strict=True)
    )
    assert one[0] != pytest.approx(one[1], rel=1e-9)
    assert other[0] == pytest.approx(other[1], rel=1e-12)


@shows("`Adafactor` and `LBFGS`, parameters without elements")
def _() -> None:
    for name in ("Adafactor", "LBFGS"):
        for library in (torch.optim, stepwell):
            p = param(0, 3)
            optimizer = getattr(library, name)([p])
            closure = quadratic(p)
            closure()
            if library is stepwell:
                optimizer.step(closure)
            else:
                refused(lambda o=optimizer, c=closure: o.step(c))


@shows("signature of `Optimizer`")
def _() -> None:
    one, other = both(lambda lib: list(inspect.signature(lib.Optimizer).parameters))
    assert one == ["params", "defaults"]
    assert other == ["params", "args", "kwargs"]
    defaults = {"lr": 0.5}
    assert stepwell.Optimizer(weights(), defaults).defaults == defaults
    assert stepwell.Optimizer(params=weights(), defaults=defaults).defaults == defaults


@shows("`issubclass(AdamW, Adam)`")
def _() -> None:
    assert both(lambda lib: issubclass(lib.AdamW, lib.Adam)) == (True, False)


# Checkpoints


@shows("`load_state_dict`: state of another precision")
def _() -> None:
    donor = torch.optim.AdamW(weights())
    train(donor)
    kinds = []
    for library, more in (
        (torch.optim, {}),
        (stepwell, {}),
        (stepwell, {"dtype": "param"}),
        (stepwell, {"dtype": torch.float64}),
    ):
        params = weights(dtype=torch.bfloat16)
        optimizer = library.AdamW(params)
        optimizer.load_state_dict(donor.state_dict(), **more)
        kinds.append(optimizer.state[params[0]]["exp_avg"].dtype)
    assert kinds == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64]


@shows("`load_state_dict`: tensors")
def _() -> None:
    def shared(library: Any) -> bool:
        donor, taker = library.AdamW(weights()), library.AdamW(weights())
        train(donor)
        saved = donor.state_dict()
        taker.load_state_dict(saved)
        held = next(iter(taker.state.values()))["exp_avg"]
        return bool(held is saved["state"][0]["exp_avg"])

    assert both(shared) == (True, False)


@shows("`load_state_dict`: matching")
def _() -> None:
    def shapes(library: Any) -> list[tuple[int, ...]]:
        donor, taker = library.AdamW(named_weights("a b")), library.AdamW(named_weights("b a"))
        train(donor)
        taker.load_state_dict(donor.state_dict())
        return [tuple(taker.state[p]["exp_avg"].shape) for p in taker.param_groups[0]["params"]]

    assert both(shapes) == ([(2, 1), (2, 2)], [(2, 2), (2, 1)])


@shows("`load_state_dict`: wrong shapes, missing entries")
def _() -> None:
    donor = torch.optim.AdamW(weights())
    train(donor)
    saved = donor.state_dict()
    del saved["state"][0]["exp_avg"]
    saved["state"][1]["exp_avg"] = torch.ones(7)
    torch.optim.AdamW(weights()).load_state_dict(saved)
    optimizer = stepwell.AdamW(weights())
    said = str(refused(lambda: optimizer.load_state_dict(saved)))
    assert "missing: parameter 0 (group 0): exp_avg" in said
    assert "mismatched: parameter 1 (group 0): exp_avg must have shape (5,), got (7,)" in said
    assert not optimizer.state
    assert len(optimizer.load_state_dict(saved, strict=False).missing) == 1
    assert len(optimizer.state) == 1


@shows("`load_state_dict`: `foreach`, `fused`, `capturable`, `differentiable`")
def _() -> None:
    def flags(library: Any) -> tuple[Any, Any]:
        optimizer = library.AdamW(weights(), fused=True)
        optimizer.load_state_dict(library.AdamW(weights(), foreach=True).state_dict())
        return optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"]

    assert both(flags) == ((None, True), (True, None))


@shows("`load_state_dict`: `param_groups`")
def _() -> None:
    def same(library: Any) -> bool:
        optimizer = library.AdamW(weights())
        group = optimizer.param_groups[0]
        optimizer.load_state_dict(optimizer.state_dict())
        return group is optimizer.param_groups[0]

    assert both(same) == (False, True)


@shows("a checkpoint whose step count is NaN or negative, or that another rule saved")
def _() -> None:
    donor = torch.optim.AdamW(weights())
    train(donor)
    for number in (math.nan, -1.0):
        saved = copy.deepcopy(donor.state_dict())
        saved["state"][0]["step"].fill_(number)
        theirs("AdamW")(weights()).load_state_dict(copy.deepcopy(saved))
        assert "step must be a count" in str(
            refused(lambda s=saved: ours("AdamW")(weights()).load_state_dict(s))
        )
    other = torch.optim.SGD(weights(), momentum=0.9).state_dict()
    torch.optim.Adadelta(weights()).load_state_dict(other)
    error = refused(lambda: stepwell.Adadelta(weights()).load_state_dict(other))
    assert "was it saved by another optimizer?" in str(error)


# The classes


@shows("hooks around a `step` that calls `super().step()`")
def _() -> None:
    def calls(library: Any) -> int:
        def step(self: Any, closure: Any = None) -> Any:
            return super(cls, self).step(closure)

        cls: Any = type("Mine", (library.SGD,), {"step": step})
        library.SGD(weights()).step()
        optimizer, seen = cls(weights()), []
        optimizer.register_step_pre_hook(lambda *_: seen.append(1))
        fill_grads(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
        return len(seen)

    assert both(calls) == (2, 1)


@shows("modules such as `torch.optim.adamw`")
def _() -> None:
    assert importlib.import_module("torch.optim.adamw").adamw
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("stepwell.adamw")
    assert importlib.import_module("stepwell.optimizers.adamw").AdamW is stepwell.AdamW


@shows("`functional`, before torch 2.15")
def _() -> None:
    assert hasattr(torch.optim, "functional") == (INSTALLED >= (2, 15))
    assert stepwell.functional.adamw


SGD_ARGUMENTS = {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}


def called(library: Any, params: Any, grads: Any, buffers: Any, momentum: float = 0.0) -> Any:
    """A step of the function `sgd`, by which parameters have then moved to 0.5 or less."""
    module = library if library is stepwell.functional else importlib.import_module(library)
    module.sgd(params, grads, buffers, lr=0.5, momentum=momentum, **SGD_ARGUMENTS)
    assert all(bool((p <= 0.5).all()) for p in params)


@shows("functions of `functional`: parameters that require grad")
def _() -> None:
    said = refused(lambda: called("torch.optim.sgd", [param(3)], [torch.ones(3)], []))
    assert str(said).startswith("a leaf Variable that requires grad")
    called(stepwell.functional, [param(3)], [torch.ones(3)], [])


@shows("functions of `functional`: a list that is too short")
def _() -> None:
    params, grads = ([torch.ones(3) for _ in range(2)] for _ in range(2))
    said = refused(lambda: called("torch.optim.sgd", params, grads, [None], momentum=0.9))
    assert type(said) is IndexError
    assert not torch.equal(params[0], torch.ones(3))
    params = [torch.ones(3) for _ in range(2)]
    refused(lambda: called(stepwell.functional, params, grads, [None], momentum=0.9))
    assert torch.equal(params[0], torch.ones(3))


@shows("functions of `functional`: state that is None")
def _() -> None:
    keywords = {"lr": 0.5, "rho": 0.9, "eps": 1.0, "weight_decay": 0.0, "maximize": False}

    def step(function: Any) -> Any:
        lists: Any = [[torch.ones(3)], [torch.ones(3)], [None], [None], [torch.tensor(0.0)]]
        function(*lists, **keywords)
        return lists

    function = importlib.import_module("torch.optim.adadelta").adadelta
    assert type(refused(lambda: step(function))) is AttributeError
    assert all(isinstance(found, Tensor) for (found,) in step(stepwell.functional.adadelta))


@shows("`functional.muon(foreach=True)`")
def _() -> None:
    options = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True, "eps": 1e-7}
    ns = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "adjust_lr_fn": None}

    def step(function: Any) -> None:
        lists = [[torch.eye(3)], [torch.eye(3)], [torch.zeros(3, 3)]]
        function(*lists, foreach=True, has_complex=False, **options, **ns)

    function = importlib.import_module("torch.optim._muon").muon
    assert str(refused(lambda: step(function))) == "Foreach is not supported for Muon yet"
    step(stepwell.functional.muon)


@shows("`SequentialLR.recursive_undo`")
def _() -> None:
    schedules = [library.lr_scheduler.SequentialLR for library in (torch.optim, stepwell)]
    assert [hasattr(schedule, "recursive_undo") for schedule in schedules] == [True, False]
