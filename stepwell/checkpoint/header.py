"""The outer form of a file: the header of the safetensors format, written, and read with suspicion.

A file is 8 bytes with the length of the header, the header in JSON, and the bytes of the tensors,
one behind the other without gaps. Here the header begins with a seal, the XXH3-128 of the length
and of the header itself with zeros in place of the seal: a header that was changed is refused
before it is parsed.

Format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from ..matching import LoadReport

__all__ = [
    "BLANK",
    "CODES",
    "PREFIX",
    "CheckpointError",
    "Entry",
    "Header",
    "check_name",
    "encode",
    "is_of_torch",
    "parse",
    "plan",
]

LONGEST = 100_000_000
"""Bytes of a header; the limit of safetensors itself."""

MOST_VALUES = 1_000_000
"""How many values the JSON of a header may have, beside one for each 64 bytes of the file. Python
takes some 100 bytes for each.
"""

PREFIX = b'{"__metadata__":{"xxh3_128":"'
BLANK = "0" * 32
"""Stands where a digest will be, until it is known."""
SEAL = slice(len(PREFIX), len(PREFIX) + len(BLANK))
KEYS = {"dtype", "shape", "data_offsets"}

LINE = 64
"""Bytes of a cache line. Memory of tensors begins at a multiple of it, and so do they in a file if
they can: some processors copy five times slower between places that lie otherwise in their lines.
"""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, that is none, or that does not fit.

    Nothing was changed, unless the error says what.

    Attributes:
        report: all of what does not fit, or None if it is something else
    """

    report: LoadReport | None = None


class Entry(NamedTuple):
    """Where a tensor lies: its bytes from `start` to `stop`, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a header says; `first` is the place in the file of the first byte of the tensors."""

    entries: dict[str, Entry]
    description: dict[str, Any]
    first: int


def check_name(name: str) -> None:
    """Check that a tensor may have this name.

    Raises:
        ValueError: whoever writes tensors to files of their names would leave the folder
    """
    parts = re.split(r"[/\\]", name)
    if not name or ".." in parts or not parts[0] or "\0" in name or name == "__metadata__":
        raise ValueError(f"a tensor must not be named {name!r:.80}")


def plan(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Give each tensor its place: whole cache lines first, then wider elements before others.

    Raises:
        TypeError, ValueError: the format has no such elements, or no such name
    """
    entries: dict[str, Entry] = {}
    start = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: _rank(item[1])):
        check_name(name)
        if tensor.dtype not in CODES:
            raise TypeError(f"{name} is {tensor.dtype}, which the safetensors format has not")
        stop = start + tensor.numel() * tensor.element_size()
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), start, stop)
        start = stop
    return entries


def _rank(tensor: Tensor) -> tuple[bool, int]:
    return tensor.numel() * tensor.element_size() % LINE > 0, -tensor.element_size()


def encode(entries: Mapping[str, Entry], description: Mapping[str, Any]) -> bytes:
    """The length and the header, sealed; as long as the texts in the description are.

    Raises:
        ValueError: it is longer than any reader takes
    """
    metadata = {"xxh3_128": BLANK, "stepwell": _json(description)}
    listed = {name: _entry(entry) for name, entry in entries.items()}
    header = _json({"__metadata__": metadata, **listed}).encode()
    header += b" " * (-(8 + len(header)) % LINE)
    if len(header) > LONGEST:
        raise ValueError(f"the header would be {len(header):,} bytes, readers take {LONGEST:,}")
    num_bytes = len(header) + max((entry.stop for entry in entries.values()), default=0)
    if _num_values(header) > _most_values(num_bytes):
        raise ValueError(
            f"the header would have {_num_values(header):,} values, readers take "
            f"{_most_values(num_bytes):,}: put long lists of numbers into tensors"
        )
    length = len(header).to_bytes(8, "little")
    return length + _with_seal(header, _seal(length, header))


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "dtype": CODES[entry.dtype],
        "shape": entry.shape,
        "data_offsets": (entry.start, entry.stop),
    }


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _num_values(header: bytes) -> int:
    """At least how many values the JSON has, before it is parsed."""
    return sum(map(header.count, (b",", b"[", b"{")))


def _most_values(num_bytes: int) -> int:
    return MOST_VALUES + num_bytes // 64


def _seal(length: bytes, header: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(length + _with_seal(header, BLANK.encode())).encode()


def _with_seal(header: bytes, seal: bytes) -> bytes:
    return header[: SEAL.start] + seal + header[SEAL.stop :]


def check_length(start: bytes, num_bytes: int) -> int:
    """The length of the header of a file that starts like this.

    Raises:
        CheckpointError: there is none, or it goes past the end of the file
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 + len(PREFIX) or start[8:] != PREFIX:
        raise CheckpointError(_stranger(start))
    if length > LONGEST or 8 + length > num_bytes:
        raise CheckpointError(
            f"claims a header of {length:,} bytes; the file has {num_bytes:,}, and a header at "
            f"most {LONGEST:,}"
        )
    return length


def is_of_torch(start: bytes) -> bool:
    """Return whether a file with these first bytes may be one of `torch.save`, new or old."""
    return start.startswith((b"PK\x03\x04", b"\x80"))


def _stranger(start: bytes) -> str:
    """Describe a file that does not start as a checkpoint does."""
    if is_of_torch(start):
        return (
            "is a file of torch.save: python -m stepwell checkpoint convert IN OUT makes a "
            "checkpoint of it"
        )
    if start[8:9] == b"{":
        return (
            "is not a stepwell checkpoint, but a safetensors file that holds no training, or a "
            "damaged one: model.load_state_dict(safetensors.torch.load_file(path)) loads weights"
        )
    return "is not a stepwell checkpoint: its header is not that of one"


def parse(header: bytes, num_bytes: int) -> Header:
    """The header of a file of this size, with everything checked that does not need the tensors.

    Raises:
        CheckpointError: it is damaged, or tensors overlap, leave gaps or lie outside of the file
    """
    if header[SEAL] != _seal(len(header).to_bytes(8, "little"), header):
        raise CheckpointError("is damaged: the header is not what was written")
    if _num_values(header) > _most_values(num_bytes):
        raise CheckpointError(f"has a header of {_num_values(header):,} values, too many to read")
    content = _decoded(header, "the header")
    metadata = content.pop("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("stepwell"), str):
        raise CheckpointError("is damaged: the header has no description of a checkpoint")
    entries = {name: _checked(name, entry) for name, entry in content.items()}
    first = 8 + len(header)
    _check_places(entries, num_bytes - first)
    return Header(entries, _decoded(metadata["stepwell"], "the description"), first)


def _decoded(text: bytes | str, what: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is damaged: {what} is no JSON: {error!s:.200}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"is damaged: {what} must be an object")
    return content


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _checked(name: str, entry: Any) -> Entry:
    try:
        check_name(name)
    except ValueError as error:
        raise CheckpointError(f"is damaged: {error}") from None
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise CheckpointError(f"is damaged: the entry of {name!r:.80} is none of a tensor")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"is damaged: {name!r:.80} has elements of kind {code!r:.40}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"is damaged: {name!r:.80} has no proper shape and place")
    made = Entry(DTYPES[code], tuple(shape), *offsets)
    if made.stop - made.start != math.prod(shape) * made.dtype.itemsize:
        raise CheckpointError(f"is damaged: {name!r:.80} has not as many bytes as its shape asks")
    return made


def _are_sizes(values: Any) -> bool:
    # torch counts elements in 64 bits, and has no use for many dimensions
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(size) is int and 0 <= size < 1 << 62 for size in values)
    )


def _check_places(entries: Mapping[str, Entry], num_bytes: int) -> None:
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != reached:
            raise CheckpointError(
                f"is damaged: {name!r:.80} lies at {entry.start:,}, where {reached:,} must follow"
            )
        reached = entry.stop
    if reached != num_bytes:
        raise CheckpointError(
            f"is damaged: the tensors take {reached:,} bytes, the file has {num_bytes:,} for them"
        )
