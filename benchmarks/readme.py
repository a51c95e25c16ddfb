"""`python -m benchmarks.readme`: the table of the README, from the newest results."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
COLUMNS = ("stepwell", "fused", "default")


def table() -> str:
    """The rows of the results, in Markdown."""
    lines = [
        "| rule, dtype | work | stepwell | torch fused | torch default | vs fused | vs default |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in json.loads(RESULTS.read_text())["speeds"]:
        times, wrong = row["microseconds"], row["wrong"]
        shown = [_time(name, times, wrong) for name in COLUMNS]
        ratios = [_ratio(name, times) for name in COLUMNS[1:]]
        rule = f"{row['rule']}, {row['dtype']}"
        lines.append(f"| {' | '.join([rule, row['work'], *shown, *ratios])} |")
    return "\n".join(lines) + "\n"


def _time(name: str, times: dict[str, float], wrong: dict[str, str]) -> str:
    if name in wrong:
        return "wrong"
    return f"{times[name]:,.{1 if times[name] < 100 else 0}f}" if name in times else "-"


def _ratio(name: str, times: dict[str, float]) -> str:
    return f"{times[name] / times['stepwell']:.1f}x" if name in times else "-"


def main() -> None:
    """Put the table into the README."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    new, found = re.subn(
        r"(?m)^TABLE\n|^\| rule, dtype(?:.*\n)(?:\|.*\n)+", lambda _: table(), text
    )
    if found != 1:
        raise SystemExit("README.md: the table of numbers was not found")
    readme.write_text(new)


if __name__ == "__main__":
    main()
