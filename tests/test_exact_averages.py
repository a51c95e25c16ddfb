"""Do averages that tensors hold rounded go on, to the bit, after whatever is done to them?"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.optim.swa_utils as theirs
from torch import Tensor, nn

from stepwell import swa_utils as ours
from stepwell.checkpoint import CheckpointError, from_torch, load, save

from .cases import named

HALF = (torch.bfloat16, torch.float16)
OTHER = torch.zeros(1)


def _model(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 200), nn.BatchNorm1d(200), nn.Linear(200, 200)).to(dtype)
    # one that is tied
    model.add_module("tied", model[2])
    return model


def _averaged(model: nn.Module, use_buffers: bool = True) -> Any:
    function = ours.get_ema_multi_avg_fn(0.999)
    return ours.AveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers)


def _train(model: nn.Module, *averages: Any, steps: int = 3) -> None:
    """Move all parameters and buffers by less than an average in half precision can follow."""
    for _ in range(steps):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1 if tensor.dtype is torch.int64 else 0.03)
        for averaged in averages:
            averaged.update_parameters(model)


def _assert_alike(one: nn.Module, other: nn.Module) -> None:
    for found, expected in (
        (one.state_dict(), other.state_dict()),
        (one.module.state_dict(), other.module.state_dict()),
    ):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype is value.dtype, name
            assert torch.equal(found[name], value), name


def _by_state_dict(averaged: Any, fresh: Any, path: Path) -> Any:
    fresh.load_state_dict(copy.deepcopy(averaged.state_dict()))
    return fresh


def _by_assignment(averaged: Any, fresh: Any, path: Path) -> Any:
    fresh.load_state_dict(copy.deepcopy(averaged.state_dict()), assign=True)
    return fresh


def _by_torch(averaged: Any, fresh: Any, path: Path) -> Any:
    file = io.BytesIO()
    torch.save(averaged.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def _by_safetensors(averaged: Any, fresh: Any, path: Path) -> Any:
    # which has no tied tensors
    tensors = {name: value.clone() for name, value in averaged.state_dict().items()}
    fresh.load_state_dict(safetensors.torch.load(safetensors.torch.save(tensors)))
    return fresh


def _by_checkpoint(averaged: Any, fresh: Any, path: Path) -> Any:
    save(path, averaged=averaged)
    load(path, averaged=fresh)
    return fresh


def _inside_of_a_model(averaged: Any, fresh: Any, path: Path) -> Any:
    models = [nn.ModuleDict({"average": each}) for each in (averaged, fresh)]
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    save(path, model=models[1])
    load(path, model=models[1])
    return fresh


def _by_inference(averaged: Any, fresh: Any, path: Path) -> Any:
    with torch.inference_mode():
        fresh.load_state_dict(averaged.state_dict())
    return fresh


RESUMES: dict[str, Callable[[Any, Any, Path], Any]] = {
    "state dict": _by_state_dict,
    "assigned": _by_assignment,
    "torch.save": _by_torch,
    "safetensors": _by_safetensors,
    "checkpoint": _by_checkpoint,
    "in a model": _inside_of_a_model,
    "inference mode": _by_inference,
    "deepcopy": lambda averaged, fresh, path: copy.deepcopy(averaged),
    # the function that averages cannot be pickled
    "pickle": lambda averaged, fresh, path: _pickled(averaged, fresh),
}


def _pickled(averaged: Any, fresh: Any) -> Any:
    function, averaged.multi_avg_fn = averaged.multi_avg_fn, None
    found = pickle.loads(pickle.dumps(averaged))
    averaged.multi_avg_fn = found.multi_avg_fn = function
    return found


@pytest.mark.parametrize("dtype", **named((*HALF, torch.float32)))
@pytest.mark.parametrize("resume", RESUMES)
def test_a_resumed_average_goes_on_to_the_bit(
    resume: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = _model(dtype)
    through, resumed = _averaged(model), _averaged(model)
    for _ in range(4):
        _train(model, through, resumed)
        resumed = RESUMES[resume](resumed, _averaged(model), tmp_path / "a.safetensors")
    _assert_alike(resumed, through)
    start = _averaged(model).module[0].weight
    assert not torch.equal(resumed.module[0].weight, start)


def test_averages_that_an_earlier_version_has_pickled_go_on() -> None:
    model = _model()
    through, old = _averaged(model), _averaged(model)
    _train(model, through, old)
    through.multi_avg_fn = old.multi_avg_fn = None
    # which had the copies under another name, and no hook
    vars(old)["_wide"] = vars(old).pop("_exact")._copies
    old._state_dict_hooks.clear()
    resumed = pickle.loads(pickle.dumps(old))
    _train(model, through, resumed)
    _assert_alike(resumed, through)


def test_updates_in_compiled_code_are_those_without_it() -> None:
    """A graph is left for them: each tensor would be compiled by itself."""
    model = _model()
    plain, averaged = _averaged(model), _averaged(model)
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["total"]
    update = torch.compile(lambda: averaged.update_parameters(model), backend="eager")
    for _ in range(3):
        _train(model, plain, steps=1)
        update()
    _assert_alike(averaged, plain)
    assert frames["total"] - before <= 1


@pytest.mark.parametrize("package", [ours, theirs])
@pytest.mark.parametrize("dtype", **named(HALF))
def test_torch_rounds_what_it_loads_to_what_the_module_holds(
    package: Any, dtype: torch.dtype
) -> None:
    model = _model(dtype)
    averaged = _averaged(model)
    _train(model, averaged)
    other = package.AveragedModel(model)
    other.load_state_dict(averaged.state_dict())
    for name, value in averaged.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], value), name
    # and the module alone
    model.load_state_dict(averaged.module.state_dict())
    names = {name.removeprefix("module."): v for name, v in averaged.state_dict().items()}
    del names["n_averaged"]
    model.load_state_dict(names)


@pytest.mark.parametrize("kept", ["module", "keep_vars"])
def test_tensors_of_the_module_are_as_they_were(kept: str) -> None:
    averaged = _averaged(_model())
    if kept == "module":
        found = averaged.module.state_dict()
        assert found["0.weight"].data_ptr() == averaged.module[0].weight.data_ptr()
    else:
        found = averaged.state_dict(keep_vars=True)
        assert found["module.0.weight"] is averaged.module[0].weight


@pytest.mark.parametrize("strict", [True, False])
def test_files_with_rounded_averages_load(strict: bool, tmp_path: Path) -> None:
    """As torch's AveragedModel, and earlier versions of this one, leave them."""
    model, path = _model(), tmp_path / "a.safetensors"
    old = theirs.AveragedModel(model)
    _train(model, old, steps=1)
    averaged = _averaged(model)
    _train(model, averaged)
    save(path, averaged=old)
    load(path, averaged=averaged, strict=strict)
    for name, value in old.module.state_dict().items():
        assert torch.equal(averaged.module.state_dict()[name], value), name
        assert torch.equal(averaged.state_dict()[f"module.{name}"].to(value.dtype), value), name
    with pytest.raises(CheckpointError, match=r"module\.0\.weight is torch\.bfloat16, must be"):
        load(path, averaged=_averaged(_model(torch.float32)))
    other = _averaged(_model(torch.float16))
    with pytest.raises(CheckpointError, match=r"module\.0\.weight is torch\.bfloat16, must be"):
        load(path, averaged=other)
    load(path, averaged=other, dtype="param")
    assert torch.equal(other.module[0].weight.bfloat16(), old.module[0].weight)


def test_a_file_that_is_refused_changes_no_average(tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "a.safetensors"
    averaged, other = _averaged(model), _averaged(model)
    _train(model, averaged, other)
    wrong = nn.Sequential(model[0])
    state = theirs.AveragedModel(wrong).state_dict()
    from_torch({"model": state}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(path, model=averaged)
    _assert_alike(averaged, other)


@pytest.mark.parametrize("cast", [torch.float32, torch.float64, torch.float16])
def test_a_cast_takes_what_the_average_knows(cast: torch.dtype) -> None:
    model = _model()
    averaged = _averaged(model)
    _train(model, averaged)
    exact = averaged.state_dict()["module.0.weight"].clone()
    averaged.to(cast)
    assert torch.equal(averaged.module[0].weight, exact.to(cast))
    assert torch.equal(averaged.state_dict()["module.0.weight"], exact.to(exact_dtype(cast)))
    # what was written meanwhile holds
    averaged.bfloat16().float()
    with torch.no_grad():
        averaged.module[0].weight.fill_(3.0)
    assert (averaged.state_dict()["module.0.weight"] == 3.0).all()


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_hand(averaged: Any, path: Path) -> None:
    for value in averaged.state_dict().values():
        if value.is_floating_point():
            value.fill_(64.0)


def _by_distributed_checkpoint(averaged: Any, path: Path) -> None:
    other = copy.deepcopy(averaged)
    _by_hand(other, path)
    dcp.save({"ema": other.state_dict()}, checkpoint_id=path, no_dist=True)
    dcp.load({"ema": averaged.state_dict()}, checkpoint_id=path, no_dist=True)


READS: dict[str, Callable[[Any], Tensor]] = {
    "module": lambda averaged: averaged.module[0].weight,
    "parameters": lambda averaged: next(averaged.parameters()),
    "buffers": lambda averaged: dict(averaged.named_buffers())["module.1.running_mean"],
    "state dict": lambda averaged: averaged.state_dict()["module.0.weight"],
    "its tensors": lambda averaged: averaged.state_dict(keep_vars=True)["module.0.weight"],
    "deepcopy": lambda averaged: copy.deepcopy(averaged).module[0].weight,
    "pickle": lambda averaged: _pickled(averaged, None).module[0].weight,
    "cast": lambda averaged: averaged.float()._modules["module"][0].weight,
    "loaded in part": lambda averaged: _loaded_in_part(averaged).module[0].weight,
}


def _loaded_in_part(averaged: Any) -> Any:
    averaged.load_state_dict({"n_averaged": torch.tensor(3)}, strict=False)
    return averaged


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("read", [*READS, "forward"])
@pytest.mark.parametrize("write", [_by_hand, _by_distributed_checkpoint])
def test_what_is_written_into_a_state_dict_is_seen_at_once(
    write: Any, read: str, tmp_path: Path
) -> None:
    model = _model()
    averaged = _averaged(model)
    _train(model, averaged)
    write(averaged, tmp_path)
    if read == "forward":
        with torch.no_grad():
            assert torch.equal(averaged.eval()(torch.zeros(1, 3).bfloat16()), _of_64s())
    else:
        assert (READS[read](averaged) == 64.0).all()
    averaged.bfloat16().update_parameters(model)
    assert (averaged.module[0].weight > 60).all()


def _of_64s() -> Tensor:
    model = _model().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(64)
        return model(torch.zeros(1, 3).bfloat16())  # type: ignore[no-any-return]


def test_weights_that_stand_in_an_average_for_a_while_take_no_digits_from_it() -> None:
    """They are what a state dict holds meanwhile; those of other tensors are the averages."""
    model = _model()
    averaged, twin = _averaged(model), _averaged(model)
    _train(model, averaged, twin)
    weight = averaged.module[0].weight
    kept = weight.detach().clone()
    for resumed in (averaged, copy.deepcopy(averaged)):
        weight = resumed.module[0].weight
        with torch.no_grad():
            weight.copy_(model[0].weight)
        for _ in range(2):
            found, expected = resumed.state_dict(), twin.state_dict()
            assert torch.equal(found.pop("module.0.weight").bfloat16(), weight)
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
        resumed = copy.deepcopy(resumed)
        with torch.no_grad():
            resumed.module[0].weight.copy_(kept)
        _assert_alike(resumed, twin)
    # those that are left there are what is averaged on
    averaged.update_parameters(model)
    with torch.no_grad():
        averaged.module[0].weight.copy_(kept)
    assert torch.equal(averaged.state_dict()["module.0.weight"], kept.float())


def test_compiled_averages_stay_whole_graphs() -> None:
    averaged = _averaged(_model()).eval()
    compiled = torch.compile(averaged, backend="eager", fullgraph=True)
    given = torch.ones(2, 3).bfloat16()
    assert torch.equal(compiled(given), averaged(given))


def test_what_is_written_into_a_copy_of_an_average_counts() -> None:
    model = _model()
    averaged = _averaged(model)
    _train(model, averaged)
    for twin in (copy.deepcopy(averaged), averaged):
        with torch.no_grad():
            twin.module[0].weight.fill_(64.0)
        twin.update_parameters(model)
        assert (twin.module[0].weight > 60).all()


def test_a_first_update_takes_all_digits_of_the_model() -> None:
    model = _model(torch.float32)
    averaged = _averaged(model).bfloat16()
    # what was loaded or saved before counts no more
    averaged.load_state_dict(averaged.state_dict())
    averaged.update_parameters(model)
    assert torch.equal(averaged.state_dict()["module.0.weight"], model[0].weight)
    assert torch.equal(averaged.module[0].weight, model[0].weight.bfloat16())


def test_whole_numbers_with_more_digits_than_float64() -> None:
    model = nn.Module()
    model.register_buffer("seed", torch.tensor([2**62 + 1, 3]))
    averaged = _averaged(model)
    averaged.update_parameters(model)
    for _ in range(2):
        assert torch.equal(averaged.module.seed, model.seed)
        assert torch.equal(averaged.state_dict()["module.seed"], model.seed)
        averaged.load_state_dict(averaged.state_dict())


@pytest.mark.parametrize(
    "hook",
    [
        lambda state_dict: state_dict.__delitem__("module.0.weight"),
        lambda state_dict: state_dict.update({"module.0.weight": OTHER}),
    ],
    ids=["removes", "replaces"],
)
def test_what_hooks_of_the_module_make_of_a_state_dict_stays(hook: Any) -> None:
    model = _model()
    model.register_state_dict_post_hook(lambda module, state_dict, prefix, _: hook(state_dict))
    assert _averaged(model).state_dict().get("module.0.weight") in (None, OTHER)
