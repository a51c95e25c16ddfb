"""`python -m benchmarks.readme`: the tables of the README, from the newest results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import FLAGS

__all__ = ["compact_table", "full_table", "updated"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
COLUMNS = ("stepwell", "fused", "default")

Row = Mapping[str, Any]


def full_table(rows: Iterable[Row]) -> str:
    """A line per row, in Markdown."""
    lines = [
        "| rule, dtype | work | stepwell | torch fused | torch default | vs fused | vs default |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times, wrong = row["microseconds"], row["wrong"]
        shown = [_time(name, times, wrong) for name in COLUMNS]
        ratios = [_ratio(name, times) for name in COLUMNS[1:]]
        rule = f"{row['rule']}, {row['dtype']}"
        lines.append(f"| {' | '.join([rule, row['work'], *shown, *ratios])} |")
    return "\n".join(lines) + "\n"


def compact_table(rows: Sequence[Row]) -> str:
    """A line per rule, in Markdown: each work, and what a rule moves beside the yardstick."""
    works = dict.fromkeys(row["work"] for row in rows)
    lines = [
        f"| rule | {' | '.join([*works, 'bandwidth'])} |",
        f"|---|{'---:|' * (len(works) + 1)}",
    ]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        found = {row["work"]: row for row in rows if row["rule"] == rule}
        cells = [_beside_best(found[work]) if work in found else "-" for work in works]
        shares = (row["share_of_yardstick"] for row in found.values())
        share = next((f"{100 * share:.0f} %" for share in shares if share), "-")
        lines.append(f"| {' | '.join([rule, *cells, share])} |")
    return "\n".join(lines) + "\n"


def _time(name: str, times: Mapping[str, float], wrong: Mapping[str, str]) -> str:
    if name in wrong:
        return "wrong"
    return f"{times[name]:,.{1 if times[name] < 100 else 0}f}" if name in times else "-"


def _ratio(name: str, times: Mapping[str, float]) -> str:
    return f"{times[name] / times['stepwell']:.1f}x" if name in times else "-"


def _beside_best(row: Row) -> str:
    times = row["microseconds"]
    best = min((name for name in FLAGS if name in times), key=times.__getitem__, default="")
    return f"{_time('stepwell', times, row['wrong'])} ({_ratio(best, times)})"


def updated(text: str, rows: Sequence[Row]) -> str:
    """The README with the tables of these results.

    Raises:
        SystemExit: one of the tables is not there
    """
    compact = {row["rule"] for row in rows if row.get("share_of_yardstick")}
    tables = {
        r"rule, dtype \|": full_table(row for row in rows if row["rule"] not in compact),
        r"rule \|": compact_table([row for row in rows if row["rule"] in compact]),
    }
    for head, table in tables.items():
        pattern = rf"(?m)^\| {head}.*\n(?:\|.*\n)+"
        parts = re.split(pattern, text)
        if len(parts) != 2:
            raise SystemExit(f"README.md: the table of numbers that begins with {head} is missing")
        text = table.join(parts)
    return text


def main() -> None:
    """Put the tables into the README."""
    readme = ROOT / "README.md"
    rows = json.loads(RESULTS.read_text())["speeds"]
    readme.write_text(updated(readme.read_text(), rows))


if __name__ == "__main__":
    main()
