"""Totals: values that depend on several parameters, as a rule asks for them with `across=`.

The total is a tensor where all shares of it are tensors, so that nothing waits for a device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends import Launch
from .cohort import Cohort
from .language.number import added
from .native.uploads import upload

__all__ = ["Adder"]


class Adder:
    """Adds up what the parameters of several launches contribute.

    Args:
        groups: how many there are
        kept: what captured graphs read
    """

    def __init__(self, groups: int, kept: list[Any]) -> None:
        self._groups = groups
        self._kept = kept
        self._members: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, launches: list[Launch], found: list[Any]) -> Any:
        """The total after those that were found: a number by group, or a tensor.

        Either way it does not depend on how parameters are ordered and grouped: the sum of host
        numbers is exact, those on a device are sorted first.
        """
        pairs = [(launch, launch.shares(found)) for launch in launches]
        launches = [launch for launch, share in pairs if len(share)]
        shares: list[Any] = [share for _, share in pairs if len(share)]
        if shares and all(isinstance(share, Tensor) for share in shares):
            members, is_member = self._members_of(launches, len(found))
            device = shares[0].device
            together = torch.cat([share.to(device, non_blocking=True) for share in shares])
            # in the order of size, with what is no member at the end
            lowest = torch.nn.functional.pad(together, (0, 1), value=-math.inf)[members]
            return _sum(lowest.sort(dim=1, descending=True).values.where(is_member, 0.0))
        by_key: defaultdict[int | None, list[float]] = defaultdict(list)
        for launch, share in zip(launches, shares, strict=True):
            if isinstance(share, Tensor):
                share = zip(_keys(launch.cohort, len(found)), share.tolist(), strict=True)
            for key, value in share:
                by_key[key].append(value)
        return {key: added(values) for key, values in by_key.items()}

    def _members_of(self, launches: list[Launch], number: int) -> tuple[Tensor, Tensor]:
        """Which shares add up: a row per group and one for all, or this alone; and how many."""
        if number not in self._members:
            keys = [key for launch in launches for key in _keys(launch.cohort, number)]
            count = 1 if all(key is None for key in keys) else self._groups + 1
            rows: list[list[int]] = [[] for _ in range(count)]
            for index, key in enumerate(keys):
                rows[-1 if key is None else key].append(index)
            width = 1 << (max(map(len, rows)) - 1).bit_length()
            table = np.full((count, width), len(keys), np.int64)
            for row, members in zip(table, rows, strict=True):
                row[: len(members)] = members
            sizes = np.array([len(members) for members in rows], np.int64)
            within = (np.arange(width) < sizes[:, None]).astype(np.int64)
            device = launches[0].cohort.facts.device
            tables = (upload(array, device, self._kept) for array in (table, within))
            members_table, is_member = tables
            self._members[number] = members_table, is_member.bool()
        return self._members[number]


def _sum(rows: Tensor) -> Tensor:
    """The sum of each row, pair by pair: zeros at the end are no part of the result."""
    while rows.shape[1] > 1:
        rows = rows[:, 0::2] + rows[:, 1::2]
    return rows[:, 0]


def _keys(cohort: Cohort, number: int) -> list[int | None]:
    """What each parameter adds to: its group, or None for all parameters."""
    if cohort.program.totals[number].value == "all":
        return [None] * len(cohort.params)
    return list(cohort.group_indices)
