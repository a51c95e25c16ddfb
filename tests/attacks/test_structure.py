"""Is a file refused whose JSON is well formed, rightly sealed, and means something else?

Every node of the description is replaced, removed or doubled; its seal is computed anew.
"""

from __future__ import annotations

import json
import random
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from io import StringIO

import pytest
import torch

from stepwell.__main__ import main
from stepwell.checkpoint import CheckpointError, load, save
from stepwell.checkpoint.convert import to_torch

from .test_hostile_files import Training, parts_of, with_description

NUMBERS = [None, True, 0, -1, 3, 10**400, 1e308, 1e-320]
TEXTS = ["", "x", "0.weight", "step", "params", "float32"]
LISTS = [[], [1], ["a", "b"], [[4, 3], "float32"]]
VALUES = [
    {},
    {"dict": []},
    {"dict": [["a", 1]]},
    {"dict": [["step", 10**400]]},
    {"dict": [["step", {"number": [1e30, "float32"]}]]},
    {"dict": [[0, {"dict": []}]]},
    {"dict": [[{"tensor": "model.large"}, 1]]},
    {"dict": [[{"tuple": []}, 1], [{"tuple": []}, 2]]},
    {"tuple": []},
    {"tuple": [1, 2, 3]},
    {"float": "nan"},
    {"float": "inf"},
    {"number": [1, "float32"]},
    {"number": [1.5, "bool"]},
    {"number": [10**30, "int64"]},
    {"number": [1, "quint8"]},
    {"dtype": "float32"},
    {"dtype": "_dynamo"},
    {"tensor": "model.large"},
    {"tensor": "model.0.weight"},
    {"complex": "model.large"},
    {"complex": "model.0.weight"},
    {"counter": []},
    {"counter": [[1, 2]]},
]
POOL = [*NUMBERS, *TEXTS, *LISTS, *VALUES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run.safetensors"
    save(path, **Training(0).parts, extra={"note": [1, (2.5, "x")]}, with_random_state=True)
    return path.read_bytes()


def nodes(value, place=()):
    """The places of all values in JSON, but for the outermost."""
    if not isinstance(value, (dict, list)):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*place, key)
        yield from nodes(item, (*place, key))


def changed(description, place, rng):
    """The description with something else at this place."""
    made = json.loads(json.dumps(description))
    *outer, last = place
    parent = made
    for key in outer:
        parent = parent[key]
    how, value = rng.random(), rng.choice(POOL)
    if how < 0.8:
        parent[last] = value
    elif how < 0.9:
        del parent[last]
    elif isinstance(parent, list):
        parent.insert(last, value)
    else:
        parent[rng.choice(["new", "0.weight", "dict"])] = value
    return made


def interesting(description):
    """The places in each part, with fewer of the many numbers that random states are."""
    found = [place for place in nodes(description) if place[0] != "digests"]
    numbers = [place for place in found if place[0] == "random"]
    return [place for place in found if place[0] != "random"] * 2 + numbers[:20]


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_other_structures_are_refused_or_loaded(path, whole, count):
    rng = random.Random(count)
    description = json.loads(parts_of(whole)[0]["__metadata__"]["stepwell"])
    places = interesting(description)
    fresh = Training(1)
    training = deepcopy(fresh)
    refused = 0
    for number in range(count):
        made = changed(description, places[number % len(places)], rng)
        path.write_bytes(with_description(whole, json.dumps(made)))
        if number % 100 == 0:
            look_at(path)
        before, drawn = training.bits(), torch.get_rng_state()
        try:
            load(
                path,
                **training.parts,
                strict=rng.random() < 0.6,
                with_random_state=rng.random() < 0.2,
            )
        except CheckpointError:
            refused += 1
            assert training.bits() == before, made
            assert torch.equal(torch.get_rng_state(), drawn)
        else:
            go_on(training)
            training = deepcopy(fresh)
    assert refused > count // 2


def go_on(training):
    """What was accepted can be trained."""
    for param in training.model.parameters():
        param.grad = torch.ones_like(param)
    training.optimizer.step()


def look_at(path):
    with redirect_stdout(StringIO()):
        main(["checkpoint", "show", str(path)])
        main(["checkpoint", "diff", str(path), str(path)])
    with suppress(CheckpointError):
        to_torch(path)


# Bombs


def grown(path, whole, extra):
    """The file with other JSON as `extra`, rightly sealed."""
    text = parts_of(whole)[0]["__metadata__"]["stepwell"]
    content = with_description(whole, f'{text[:-1]},"extra":[{extra}]}}')
    path.write_bytes(content)


def test_a_tensor_that_is_named_many_times_is_one(path):
    save(path, extra=[torch.ones(1000)])
    header, _ = parts_of(path.read_bytes())
    description = json.loads(header["__metadata__"]["stepwell"])
    description["extra"] *= 10_000
    path.write_bytes(with_description(path.read_bytes(), json.dumps(description)))
    loaded = load(path).extra
    assert len(loaded) == 10_000
    assert len({tensor.data_ptr() for tensor in loaded}) == 1


@pytest.mark.parametrize("item", ["[]", "0", '{"dict":[]}', '{"":0}', '[["a"]]'])
def test_headers_of_too_many_values_are_refused_before_they_are_parsed(path, item, monkeypatch):
    save(path, model=torch.nn.Linear(2, 2))
    grown(path, path.read_bytes(), ",".join([item] * 1_100_000))
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(CheckpointError, match="values, too many to read"):
        load(path)


def test_what_no_reader_takes_is_not_written(path):
    save(path, extra=list(range(500_000)))
    assert load(path).extra[-1] == 499_999
    with pytest.raises(ValueError, match="put long lists of numbers into tensors"):
        save(path, extra=[0] * 1_100_000)
    assert load(path).extra[-1] == 499_999
