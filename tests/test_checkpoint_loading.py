"""What does a load do where file and training are not quite alike, or where something fails midway?

Expected values are written out, or are what torch's own `load_state_dict` does with the same module.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stepwell
from stepwell.checkpoint import CheckpointError, load, save


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def trained(optimizer):
    """The optimizer after one step with gradients of ones."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


# Values of `extra`


def test_conjugates_and_imaginary_parts_are_no_copies_of_what_they_are_of(path):
    x = torch.tensor([1 + 2j, 3 - 4j])
    save(path, extra=[x, x.conj(), x.imag, x.conj().imag, x])
    loaded = load(path).extra
    expected = [[1 + 2j, 3 - 4j], [1 - 2j, 3 + 4j], [2.0, -4.0], [-2.0, 4.0], [1 + 2j, 3 - 4j]]
    assert [tensor.tolist() for tensor in loaded] == expected


def test_values_that_no_file_can_hold_are_named(path):
    loop = {"list": []}
    loop["list"].append(loop)
    deep = 1
    for _ in range(100):
        deep = {"a": deep}
    save(path, extra=deep)
    assert load(path).extra == deep
    for value, words in (
        (loop, r"extra.list.0 is a dict that contains itself"),
        ([deep], r"extra.0.a.* lies in 100 containers"),
        ({"n": 10**5000}, r"extra.n is a number of 16,610 bits, a checkpoint holds 14,000"),
    ):
        with pytest.raises(ValueError, match=words):
            save(path, extra=value)
    assert load(path).extra == deep


def test_names_that_collide_are_numbered(path):
    tensors = {float("nan"): torch.full((2,), float(i)) for i in range(4)}
    save(path, extra=tensors)
    assert [t.tolist() for t in load(path).extra.values()] == [[i, i] for i in range(4)]
