"""Is every file that is not what was written refused: in words, quickly, and with nothing changed?

What an attacker may do to a file is done to one here. The seal over the header is computed anew
where that is the point, by code of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import struct
from itertools import islice

import pytest
import torch
import xxhash
from torch import nn

import stepwell
from stepwell.checkpoint import CheckpointError, latest, load, save, verify
from stepwell.lr_scheduler import StepLR

PREFIX = b'{"__metadata__":{"xxh3_128":"'


class Training:
    """A small training, and copies of all that a load may change in it."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 5))
        # so large that it is read into its place, where small ones are read beforehand
        self.model.register_buffer("large", torch.randn(20_000))
        self.optimizer = stepwell.AdamW(self.model.parameters(), lr=0.1 + seed)
        self.scheduler = StepLR(self.optimizer, 2)
        self.model[1](self.model[0](torch.ones(2, 8))).sum().backward()
        self.optimizer.step()
        self.scheduler.step()

    @property
    def parts(self):
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }

    def bits(self):
        tensors = [*self.model.state_dict().values()]
        tensors += [v for state in self.optimizer.state.values() for v in state.values()]
        groups = [
            {k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups
        ]
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
        return digest, repr(groups), repr(self.scheduler.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run.safetensors"
    save(path, **Training(0).parts, extra={"note": [1, (2.5, "x")]})
    return path.read_bytes()


@pytest.fixture(scope="module")
def training():
    return Training(1)


def parts_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def sealed(header, body):
    """A file with this header, as text or as what JSON makes of it, and the right seal."""
    if not isinstance(header, bytes):
        header = json.dumps(header, separators=(",", ":")).encode()
    start = len(PREFIX)
    assert header.startswith(PREFIX)
    length = struct.pack("<Q", len(header))
    blank = header[:start] + b"0" * 32 + header[start + 32 :]
    seal = xxhash.xxh3_128_hexdigest(length + blank).encode()
    return length + header[:start] + seal + header[start + 32 :] + body


def assert_refused(path, content, training, match=None):
    # a file that is new: some file systems sync one that was cut to be written again
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    before = training.bits()
    for attempt in (verify, lambda p: load(p, **training.parts)):
        with pytest.raises(CheckpointError, match=match) as caught:
            attempt(path)
        assert str(path) in str(caught.value)
    assert training.bits() == before


def test_the_file_itself_loads(path, whole):
    path.write_bytes(whole)
    verify(path)
    training = Training(2)
    load(path, **training.parts)
    assert training.bits() == Training(0).bits()
    header, body = parts_of(whole)
    # what is refused below is refused for what was done to it
    path.write_bytes(sealed(header, body))
    verify(path)


def test_truncated_at_every_kilobyte(path, whole, training):
    for size in [*range(0, len(whole), 1024), 1, 7, 8, 9, 34, 35, len(whole) - 1]:
        assert_refused(path, whole[:size], training)
    assert_refused(path, whole + b"\0", training)


def flipped(content, rng):
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def overwritten(content, rng):
    place = rng.randrange(len(content))
    junk = rng.randbytes(rng.randint(1, 64))
    return content[:place] + junk + content[place + len(junk) :]


def shifted(content, rng):
    place, count = rng.randrange(len(content)), rng.randint(1, 100)
    return content[:place] + content[place + count :]


def grown(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.randint(1, 100)) + content[place:]


def relengthed(content, rng):
    length = rng.choice([0, 1, 2**63, 2**64 - 1, len(content), rng.randrange(2 * len(content))])
    return struct.pack("<Q", length) + content[8:]


def in_the_header(content, rng):
    length = int.from_bytes(content[:8], "little")
    return flipped(content[: 8 + length], rng) + content[8 + length :]


def edited(content, rng):
    """Some digits of the header are others."""
    length = int.from_bytes(content[:8], "little")
    digits = [i for i in range(8, 8 + length) if chr(content[i]).isdigit()]
    changed = bytearray(content)
    for place in rng.sample(digits, rng.randint(1, 3)):
        changed[place] = ord(rng.choice("0123456789"))
    return bytes(changed)


MUTATIONS = (flipped, overwritten, shifted, grown, relengthed, in_the_header, edited)


def mutants(content, seed):
    """Endlessly, files that differ from this one."""
    rng = random.Random(seed)
    while True:
        changed = rng.choice(MUTATIONS)(content, rng)
        if changed != content:
            yield changed


@pytest.mark.parametrize("seed", range(20))
def test_random_mutations(path, whole, training, seed):
    """10,000 in all, in portions that processes can share."""
    for changed in islice(mutants(whole, seed), 500):
        assert_refused(path, changed, training)


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_random_mutations_under_a_right_seal(path, whole, training, count):
    """Such a file may be a proper one; if not, it is refused in the same manner."""
    rng = random.Random(count)
    length = int.from_bytes(whole[:8], "little")
    header, body = whole[8 : 8 + length], whole[8 + length :]
    words = b'0123456789-.,:"{}[]\\ truefalsenull'
    refused = 0
    for _ in range(count):
        changed = bytearray(header)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(PREFIX) + 32, len(changed))
            how = rng.randrange(3)
            if how == 0:
                changed[place] = rng.choice(words)
            elif how == 1:
                del changed[place : place + rng.randint(1, 20)]
            else:
                other = rng.randrange(len(PREFIX) + 32, len(changed))
                changed[place:place] = changed[other : other + rng.randint(1, 30)]
        path.write_bytes(sealed(bytes(changed), body))
        before = training.bits()
        try:
            load(path, **training.parts)
        except CheckpointError:
            refused += 1
            assert training.bits() == before
    assert refused > count // 2


@pytest.mark.tiny
def test_a_flipped_bit_in_the_tensors_names_the_tensor(path, whole, training):
    header, body = parts_of(whole)
    for name, entry in islice(header.items(), 1, None):
        start = len(whole) - len(body) + entry["data_offsets"][0]
        changed = bytearray(whole)
        changed[start + 5] ^= 16
        assert_refused(path, bytes(changed), training, f"the bytes of '{name}' are not")


def with_entry(content, change):
    """The file after `change(entries)`, in which tensors are still in their order."""
    header, body = parts_of(content)
    metadata = header.pop("__metadata__")
    change(header)
    return sealed({"__metadata__": metadata, **header}, body)


def _second_and_third(entries):
    names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    return entries[names[1]], entries[names[2]]


def _overlap(entries):
    one, other = _second_and_third(entries)
    other["data_offsets"] = one["data_offsets"]
    other["shape"], other["dtype"] = one["shape"], one["dtype"]


def _gap(entries):
    one, _ = _second_and_third(entries)
    one["data_offsets"] = [x + 4 for x in one["data_offsets"]]


def _outside(entries):
    one, _ = _second_and_third(entries)
    one["data_offsets"] = [x + (1 << 40) for x in one["data_offsets"]]


def _negative(entries):
    one, _ = _second_and_third(entries)
    one["data_offsets"] = [-4, one["data_offsets"][1]]


def _backwards(entries):
    one, _ = _second_and_third(entries)
    one["data_offsets"] = one["data_offsets"][::-1]


def _setting(key, value):
    def change(entries):
        _second_and_third(entries)[0][key] = value

    return change


def _named(name):
    def change(entries):
        first = next(iter(entries))
        entries[name] = entries.pop(first)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _overlap,
        _gap,
        _outside,
        _negative,
        _backwards,
        *(
            _setting("dtype", value)
            for value in ("F64", "BOOL", "f32", "X" * 100, None, 3, ["F32"], {}, "BF16")
        ),
        *(
            _setting("shape", value)
            for value in ([1], [2**62, 2], [-1], [2.0], [True], "40", {}, None, [1] * 100)
        ),
        *(
            _setting("data_offsets", value)
            for value in ([0], [0, 1, 2], [0.0, 4.0], ["0", "4"], None, [True, False])
        ),
        *(
            _named(name)
            for name in ("../../x", "/etc/passwd", "a/../../b", "..\\x", "", "x\0y", "\\\\host\\x")
        ),
        lambda entries: entries.update(more={"dtype": "F32", "shape": [1]}),
        lambda entries: entries.update(more=[1, 2]),
        lambda entries: entries.update(more=None),
        lambda entries: entries.popitem(),
        lambda entries: _second_and_third(entries)[0].update(code="print"),
    ],
)
def test_entries_that_lie(path, whole, training, change):
    assert_refused(path, with_entry(whole, change), training)


@pytest.mark.parametrize("change", [_overlap, _gap, _outside])
def test_the_place_of_a_tensor_is_checked_before_its_bytes(path, whole, training, change):
    assert_refused(
        path, with_entry(whole, change), training, "where .* must follow|takes? .* bytes"
    )


def test_an_entry_that_stands_twice(path, whole, training):
    length = int.from_bytes(whole[:8], "little")
    header, body = whole[8 : 8 + length].rstrip(), whole[8 + length :]
    name, entry = list(parts_of(whole)[0].items())[1]
    again = json.dumps({name: entry}, separators=(",", ":")).encode()
    assert_refused(path, sealed(header[:-1] + b"," + again[1:], body), training, "stands twice")


def with_description(content, text):
    header, body = parts_of(content)
    header["__metadata__"]["stepwell"] = text
    return sealed(header, body)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{" * 100_000,
        "[" * 1_000_000,
        '{"a":' * 200_000,
        '{"schema":1,"schema":1}',
        '{"schema":NaN}',
        '{"schema":' + "9" * 100_000 + "}",
        '{"schema":2,"digests":{}}',
        '{"schema":true,"digests":{}}',
        '{"schema":1}',
        '{"schema":1,"digests":{"x":"y"}}',
        3,
        None,
    ],
    ids=lambda text: str(text)[:20],
)
def test_descriptions_that_are_none(path, whole, training, text):
    assert_refused(path, with_description(whole, text), training)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", 3),
        ("model", {"tensor": "nowhere"}),
        ("model", {"tensor": ["x"]}),
        ("model", {"dict": [[{"dict": []}, 1]]}),
        ("model", {"dict": [["0.weight", {"complex": "model.0.weight"}]]}),
        ("model", {"import": "os"}),
        ("model", {"number": [1, "float31"]}),
        ("model", {"number": [1e999, "int64"]}),
        ("model", {"number": [[1] * 10, "float32"]}),
        ("model", {"dtype": "load"}),
        ("model", {"tuple": [], "dict": []}),
        ("optimizer", None),
        ("optimizer", []),
        ("optimizer", {"rule": "AdamW", "params": {}, "groups": [], "state": {"x": []}}),
        ("optimizer", {"rule": "AdamW", "params": {"a": 1}, "groups": [1], "state": {}}),
        (
            "optimizer",
            {"rule": "AdamW", "params": {}, "groups": [{"dict": [["params", [[]]]]}], "state": {}},
        ),
        ("scheduler", 3),
        ("scheduler", None),
        ("scheduler", {"dict": [["last_epoch", "x"]]}),
        ("scheduler", {"dict": [["last_epoch", -7]]}),
    ],
    ids=str,
)
def test_parts_that_are_none(path, whole, training, part, value):
    description = json.loads(parts_of(whole)[0]["__metadata__"]["stepwell"])
    description[part] = value
    # allow_nan, for 1e999 is inf
    content = with_description(whole, json.dumps(description).replace("Infinity", "1e999"))
    path.write_bytes(content)
    before = training.bits()
    with pytest.raises(CheckpointError):
        load(path, **training.parts)
    assert training.bits() == before


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b'{"a":' * 100_000,
        b'"a":{},"a":{}}',
        b'"__metadata__":{}}',
        b"\xff\xfe}",
        b"}",
        b"",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_headers_that_are_no_json(path, whole, training, text):
    header = PREFIX + b"0" * 32 + b'","stepwell":"{}"},' + text
    assert_refused(path, sealed(header, b""), training)


@pytest.mark.tiny
@pytest.mark.parametrize("length", [99_999_000, 100_000_001, 2**31, 2**33, 2**62, 2**64 - 1])
def test_a_header_of_gigabytes(path, whole, training, length):
    # a file with holes, as large as it says
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(min(length, 2**34) + 4096)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for attempt in (verify, lambda p: load(p, **training.parts)):
        with pytest.raises(CheckpointError):
            attempt(path)
    assert latest(path.parent) is None
    with path.open("r+b") as file:
        file.seek(8)
        file.write(PREFIX)
    if length > 100_000_000:
        with pytest.raises(CheckpointError, match="claims a header of"):
            verify(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10


class Payload:
    """What a pickle may do."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.tiny
def test_a_pickle_in_disguise_is_not_executed(path, tmp_path, whole, training):
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Payload(mark))
    _, body = parts_of(whole)
    for content in (
        bomb,
        struct.pack("<Q", len(bomb)) + bomb,
        whole[:8] + PREFIX + bomb,
        sealed(PREFIX + b"0" * 32 + b'"}}' + bomb, body),
    ):
        assert_refused(path, content, training)
    torch.save({"model": Payload(mark)}, path)
    assert_refused(path, path.read_bytes(), training)
    assert not mark.exists()
    # the bomb is one
    pickle.loads(bomb)
    assert mark.exists()


def test_what_is_no_file(tmp_path, training):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises((CheckpointError, IsADirectoryError)):
            load(path, **training.parts)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing", **training.parts)
    assert latest(tmp_path) is None
