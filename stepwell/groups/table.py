"""table: what went where, to be read by people."""

from __future__ import annotations

import io
import math
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from ..param_groups import Times
from ..terminal import encodable
from ..wrapped import innermost
from .naming import Group, Named, collect

__all__ = ["GroupTable", "table"]

WIDEST_HEADING = 64
NUMBER = re.compile(r"\d+")


def table(*sources: Any, whole: bool = False) -> GroupTable:
    """Who is in which group, in which shape and with which hyperparameters, as a table.

        print(table(optimizer))
        print(table(*muon_split(model)))

    A tied parameter has one row, with all names that are known. Parameters of equal shape whose
    names differ in numbers share a row: `layers.{0..11}.linear.weight`.

    Args:
        sources: optimizers, groups, models or named parameters
        whole: give each parameter its own row

    Raises:
        TypeError, ValueError: there are no parameters, or one is in two groups of a source

    >>> print(table(torch.nn.Linear(4, 2)))
    parameter             shape    elements
    ───────────────────────────────────────
    group 0                              10
      weight              (2, 4)          8
      bias                (2,)            2
    ───────────────────────────────────────
    total: 2 parameters                  10
    """
    if not sources:
        raise TypeError("table: pass optimizers, groups, models or named parameters")
    return GroupTable([part for source in sources for part in _sections(source)], whole)


@dataclass(frozen=True)
class Section:
    """The groups of one source; those of an optimizer have a title and values in common."""

    groups: list[Group]
    title: str = ""

    @property
    def common(self) -> dict[str, Any]:
        """What all groups of an optimizer have alike."""
        first, *others = map(_values, self.groups)
        return {
            key: value
            for key, value in first.items()
            if self.title and all(str(other.get(key)) == str(value) for other in others)
        }

    def own(self, group: Group) -> dict[str, Any]:
        """What this group does not share with all others."""
        return {k: value for k, value in _values(group).items() if k not in self.common}


def _sections(source: Any) -> Iterator[Section]:
    """The groups of a source; of combined optimizers, those of each, wrapped or not."""
    source = innermost(source)
    for part in getattr(source, "optimizers", {"": source}).values():
        yield _section(part)


def _section(source: Any) -> Section:
    # a generator can be read only once
    source = list(source) if hasattr(source, "__next__") else source
    groups = collect(source, "table", frozen_too=True, unnamed_too=True).groups
    is_optimizer = isinstance(source, TorchOptimizer)
    return Section(groups, type(source).__name__ if is_optimizer else "")


def _values(group: Group) -> dict[str, Any]:
    """The hyperparameters; flags that are off say nothing."""
    return {
        key: value
        for key, value in group.items()
        if key not in ("name", "optimizer", "params") and value is not None and value is not False
    }


@dataclass(frozen=True)
class Row:
    """One parameter, or several of one kind.

    Attributes:
        members: the parameters
        label: what they are called together
    """

    members: Sequence[Named]
    label: str

    @property
    def kind(self) -> str:
        """The shape of each, and what is unusual about it."""
        param = self.members[0].param
        said = [str(tuple(param.shape))]
        if param.dtype is not torch.float32:
            said.append(str(param.dtype).removeprefix("torch."))
        if not param.requires_grad:
            said.append("frozen")
        return " ".join(said)

    @property
    def elements(self) -> str:
        """How many elements each has."""
        size = f"{self.members[0].param.numel():,}"
        return f"{len(self.members)} × {size}" if len(self.members) > 1 else size


class GroupTable:
    """What `table` returns: `str` and `print` show it, and so do rich and notebooks.

    In a terminal it is as wide as that, elsewhere as its longest name needs.
    """

    def __init__(self, sections: Sequence[Section], whole: bool) -> None:
        self._sections = sections
        self._whole = whole

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=1000, color_system=None, force_jupyter=False)
        width = Measurement.get(console, console.options, self.__rich__()).maximum
        # some programs have none
        if sys.stdout is not None and sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
        with console.capture() as capture:
            console.print(self, width=width)
        return encodable("\n".join(line.rstrip() for line in capture.get().splitlines()))

    __repr__ = __str__

    def __rich__(self) -> Table:
        rows = [[_rows(g["params"], self._whole) for g in s.groups] for s in self._sections]
        longest = 2 + max(len(row.label) for section in rows for group in section for row in group)
        shown = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, show_footer=True)
        members = {id(n.param): n for s in self._sections for g in s.groups for n in g["params"]}
        shown.add_column(
            "parameter",
            _total(list(members.values())),
            max_width=max(longest, WIDEST_HEADING),
            overflow="fold",
        )
        shown.add_column("shape", overflow="fold")
        shown.add_column(
            "elements", f"{_elements(members.values()):,}", justify="right", no_wrap=True
        )
        for section, groups in zip(self._sections, rows, strict=True):
            _add_section(shown, section, groups)
        return shown


def _add_section(shown: Table, section: Section, groups: Sequence[Sequence[Row]]) -> None:
    if section.title:
        shown.add_row(_heading(section.title, section.common))
    for index, (group, rows) in enumerate(zip(section.groups, groups, strict=True)):
        title = f"group {index}" + (f": {group['name']}" if group.get("name") else "")
        size = Text(f"{_elements(group['params']):,}", style="bold")
        shown.add_row(_heading(title, section.own(group)), "", size)
        for row in rows:
            shown.add_row(f"  {row.label}", row.kind, row.elements)


def _heading(title: str, values: Mapping[str, Any]) -> Text:
    text = Text(title, style="bold")
    if values:
        said = ", ".join(_spelt(key, value) for key, value in values.items())
        text.append(f" ({said})", style="not bold")
    return text


def _spelt(key: str, value: Any) -> str:
    if isinstance(value, Times):
        return f"{key}×{value.factor:g}"
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"


def _total(members: Sequence[Named]) -> str:
    frozen = [named for named in members if not named.param.requires_grad]
    said = f"total: {len(members):,} parameter{'s' * (len(members) != 1)}"
    if frozen:
        said += f", of which frozen: {len(frozen):,} ({_elements(frozen):,} elements)"
    return said


def _elements(members: Iterable[Named]) -> int:
    return sum(named.param.numel() for named in members)


def _rows(members: Sequence[Named], whole: bool) -> list[Row]:
    """Parameters that differ only in the numbers of their names as one row, if that says all."""
    alike: dict[Any, list[Named]] = {}
    for named in members:
        kind = named.param.shape, named.param.dtype, named.param.requires_grad
        key = named.name if whole else (NUMBER.sub("#", _label(named)), *kind)
        alike.setdefault(key, []).append(named)
    return [row for some in alike.values() for row in _merged(some)]


def _merged(members: Sequence[Named]) -> list[Row]:
    labels = [_label(named) for named in members]
    numbers = [
        tuple(dict.fromkeys(column)) for column in zip(*map(NUMBER.findall, labels), strict=True)
    ]
    if len(members) == 1 or math.prod(map(len, numbers)) != len(members):
        return [Row([named], label) for named, label in zip(members, labels, strict=True)]
    spans = iter(map(_span, numbers))
    return [Row(members, NUMBER.sub(lambda _: next(spans), labels[0]))]


def _label(named: Named) -> str:
    return " = ".join(use.name for use in named.uses)


def _span(numbers: Sequence[str]) -> str:
    """{0..11} for numbers in a row, {0,2} for others, and one number as itself."""
    if len(numbers) == 1:
        return numbers[0]
    values = list(map(int, numbers))
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(numbers)}}}"
