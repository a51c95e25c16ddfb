"""Is everything that people and libraries save with torch.save read, or else said to be left?"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import stepwell
from stepwell.__main__ import main
from stepwell.checkpoint import CheckpointError, convert, from_torch, load, verify

from .compare import assert_same_bits

NAMES = ["weight", "bias"]


def _training(library: Any, steps: int = 0) -> tuple[Any, Any, Any]:
    model = nn.Linear(3, 2)
    params: Any = model.parameters() if library is torch.optim else model.named_parameters()
    optimizer = library.AdamW(params, lr=0.1)
    scheduler = library.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


MODEL, OPTIMIZER, SCHEDULE = (part.state_dict() for part in _training(torch.optim, 3))
OTHER = _training(torch.optim, 1)[1].state_dict()
LOSS_SCALE = {"scale": 8.0}
LATE = {**SCHEDULE, "last_epoch": 7}

# what was saved; which parts are read; what is said to be kept as extra
LAYOUTS: dict[str, tuple[Any, str, str | None]] = {
    "torch": (
        {"model_state_dict": MODEL, "optimizer_state_dict": OPTIMIZER, "scheduler": SCHEDULE},
        "model optimizer scheduler",
        None,
    ),
    "lightning": (
        {
            "epoch": 1,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": MODEL,
            "loops": {"fit_loop": {"optim_progress": {"optimizer": {"step": 3}}}},
            "callbacks": {},
            "optimizer_states": [OPTIMIZER],
            "lr_schedulers": [SCHEDULE],
        },
        "model optimizer scheduler",
        "epoch, pytorch-lightning_version, loops: kept as extra",
    ),
    "lightning, weights alone": (
        {"state_dict": MODEL, "optimizer_states": [], "lr_schedulers": []},
        "model",
        None,
    ),
    "fairseq": (
        {
            "model": MODEL,
            "last_optimizer_state": OPTIMIZER,
            "optimizer_history": [{"lr_scheduler_state": {"best": 0.5}}],
        },
        "model optimizer",
        "optimizer_history: kept as extra",
    ),
    "mmengine": (
        {"state_dict": MODEL, "optimizer": OPTIMIZER, "param_schedulers": [SCHEDULE], "meta": {}},
        "model optimizer scheduler",
        None,
    ),
    "two schedules": (
        {"model": MODEL, "optimizer": OPTIMIZER, "param_schedulers": [SCHEDULE, LATE]},
        "model optimizer",
        "param_schedulers.0 (a schedule), param_schedulers.1 (a schedule): kept as extra",
    ),
    "by name": (
        {"state_dict": MODEL, "optimizers": {"all": OPTIMIZER}, "schedulers": {"all": SCHEDULE}},
        "model optimizer scheduler",
        None,
    ),
    "under a key that nobody knows": (
        {"epoch": 3, "net": MODEL, "adam": OPTIMIZER, "cosine": SCHEDULE},
        "optimizer scheduler",
        "net (tensors), epoch: kept as extra",
    ),
    "deeper": (
        {"model": MODEL, "callbacks": {"ema": {"opt": [OPTIMIZER]}}, "other_sched": {"t": 1}},
        "model",
        "callbacks.ema.opt.0 (an optimizer), other_sched: kept as extra",
    ),
    "mmengine with AMP": (
        {"state_dict": MODEL, "optimizer": {**OPTIMIZER, "loss_scaler": LOSS_SCALE}},
        "model optimizer",
        "optimizer.loss_scaler: kept as extra",
    ),
    "nothing under keys that are known": (
        {"model": MODEL, "optimizers": {}, "schedulers": {}, "optimizer": {}},
        "model",
        None,
    ),
    # of transformers' Trainer and of accelerate
    "optimizer.pt": (OPTIMIZER, "optimizer", None),
    "scheduler.pt": (SCHEDULE, "scheduler", None),
    "a list": ([OPTIMIZER], "optimizer", None),
    "a list of all": (
        [MODEL, OPTIMIZER, SCHEDULE],
        "optimizer scheduler",
        "0 (tensors): kept as extra",
    ),
    "much else": (
        {"model": MODEL, **dict.fromkeys(map(str, range(25)), 1)},
        "model",
        f"{', '.join(map(str, range(20)))}, ... and 5 more: kept as extra",
    ),
}


def _assert_loads(path: Path, parts: str) -> Any:
    model, optimizer, scheduler = _training(stepwell)
    given = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    loaded = load(path, **{part: given[part] for part in parts.split()})
    if "model" in parts:
        assert_same_bits(model.weight, MODEL["weight"], "a parameter")
    if "optimizer" in parts:
        average = optimizer.state[model.weight]["exp_avg"]
        assert_same_bits(average, OPTIMIZER["state"][0]["exp_avg"], "state")
    if "scheduler" in parts:
        assert scheduler.last_epoch == 3
    for part in given.keys() - set(parts.split()):
        with pytest.raises(CheckpointError, match=f"{part}: not in the file"):
            load(path, **{part: given[part]})
    return loaded.extra


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read(name: str, tmp_path: Path) -> None:
    content, parts, said = LAYOUTS[name]
    source, path = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save(content, source)
    expected = f"a checkpoint with {', '.join(parts.split())}" + (f"; {said}" if said else "")
    assert convert(source, path, NAMES if "optimizer" in parts else None) == expected
    extra = _assert_loads(path, parts) or {}
    # what is read is not there a second time
    kept = {key for key, value in extra.items() if value and value != {"loss_scaler": LOSS_SCALE}}
    assert not {"optimizer", "optimizer_states", "last_optimizer_state", "adam"} & kept


SEVERAL = {
    "a list": ({"model": MODEL, "optimizer": [OTHER, OPTIMIZER]}, "optimizer.0", "optimizer.1"),
    "lightning": (
        {"state_dict": MODEL, "optimizer_states": [OTHER, OPTIMIZER], "lr_schedulers": [SCHEDULE]},
        "optimizer_states.0",
        "optimizer_states.1",
    ),
    "a dict": (
        {"model": MODEL, "optimizer": {"d": OTHER, "g": OPTIMIZER}},
        "optimizer.d",
        "optimizer.g",
    ),
    "keys": (
        {"model": MODEL, "optimizer_d": OTHER, "optimizer_g": OPTIMIZER},
        "optimizer_d",
        "optimizer_g",
    ),
    "only a list": ([OTHER, OPTIMIZER], "0", "1"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_optimizers_one_is_asked_for(name: str, tmp_path: Path, capsys: Any) -> None:
    content, first, second = SEVERAL[name]
    source, path, names = tmp_path / "in.pt", tmp_path / "out", tmp_path / "names"
    torch.save(content, source)
    with pytest.raises(CheckpointError, match=f"holds {first} and {second}, of which only one"):
        convert(source, path, NAMES)
    with pytest.raises(
        CheckpointError, match=f"no optimizer at 'x.7'; .* are at {first}, {second}"
    ):
        convert(source, path, NAMES, optimizer="x.7")
    assert not path.exists()
    names.write_text("\n".join(NAMES))
    asked = ["--names", str(names), "--optimizer", second]
    assert main(["checkpoint", "convert", str(source), str(path), *asked]) == 0
    said = capsys.readouterr().out
    assert f"{first} (an optimizer): kept as extra" in said
    model, optimizer, _ = _training(stepwell)
    load(path, optimizer=optimizer)
    average = optimizer.state[model.weight]["exp_avg"]
    assert_same_bits(average, OPTIMIZER["state"][0]["exp_avg"], "state")


def test_of_several_schedules_one_is_asked_for(tmp_path: Path) -> None:
    content, path = LAYOUTS["two schedules"][0], tmp_path / "out"
    said = from_torch(content, path, NAMES, scheduler="param_schedulers.0")
    assert said == (
        "a checkpoint with model, optimizer, scheduler; param_schedulers.1 (a schedule): kept as "
        "extra"
    )
    extra = _assert_loads(path, "model optimizer scheduler")
    assert extra["param_schedulers"][0] is None
    assert extra["param_schedulers"][1]["last_epoch"] == 7


def test_what_is_there_is_named_where_nothing_is_recognized(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither the state dict .*; it has epoch, best"):
        from_torch({"epoch": 3, "best": 0.5}, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"names=\[\.\.\.\], or on the command line with --na"
    ):
        from_torch(OPTIMIZER, tmp_path / "out")


def _torch_save(content: Any, **options: Any) -> Any:
    return lambda path: torch.save(content, path, **options)


OF_TORCH = "is a file of torch.save: python -m stepwell checkpoint convert IN OUT makes a"
STRANGERS: dict[str, tuple[Any, str, str]] = {
    "options": (
        _torch_save({"args": argparse.Namespace(lr=1), "model": MODEL}),
        OF_TORCH,
        r"holds argparse\.Namespace, which only code .* stepwell\.checkpoint\.from_torch\(",
    ),
    "a whole model": (
        _torch_save(nn.Linear(2, 2)),
        OF_TORCH,
        r"holds torch\.nn\.modules\.linear\.Linear, which only code",
    ),
    "half a file": (
        lambda path: (_torch_save(MODEL)(path), path.write_bytes(path.read_bytes()[:300])),
        OF_TORCH,
        "is damaged, or no file of torch.save",
    ),
    "a pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=5)),
        OF_TORCH,
        "is damaged, or no file of torch.save",
    ),
    "safetensors": (
        lambda path: safetensors.torch.save_file(MODEL, path),
        r"a safetensors file that holds no training, .*load_state_dict\(safetensors",
        "and no file of torch",
    ),
    "text": (
        lambda path: path.write_text("hello " * 9),
        "is not a stepwell checkpoint: its header is not that of one$",
        "and no file of torch",
    ),
    "nothing": (
        lambda path: path.write_text(""),
        "is not a stepwell checkpoint: its header",
        "and no file of torch",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_told_apart(name: str, tmp_path: Path) -> None:
    write, of_load, of_convert = STRANGERS[name]
    path = tmp_path / "x.pt"
    write(path)
    for read in (load, verify):
        with pytest.raises(CheckpointError, match=of_load):
            read(path)
    with pytest.raises(CheckpointError, match=of_convert) as caught:
        convert(path, tmp_path / "out")
    # torch's words are for those who read its source
    for words in ("Error(", "Weights only load", "WeightsUnpickler", "PytorchStreamReader"):
        assert words not in str(caught.value)


def test_old_files_of_torch_are_read(tmp_path: Path) -> None:
    source, path = tmp_path / "x.pt", tmp_path / "out"
    _torch_save({"model": MODEL}, _use_new_zipfile_serialization=False)(source)
    convert(source, path)
    _assert_loads(path, "model")
