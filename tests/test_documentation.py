"""Does each example of the README and of docs/ run as pasted, and print what the page shows?

An example stands alone, unless it begins with the comment `CONTINUES` or its page has the sentence
`SHARED`: such an example is pasted after the ones above it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTINUES = "# goes on from the example above\n"
SHARED = "each goes on from the ones above it:"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """The code that a reader pastes, and the output that the page shows for it, if any."""

    place: str
    code: str
    printed: str | None


def _examples(page: Path) -> list[list[Example]]:
    """The examples of a page, those that go on from one another together."""
    text = page.read_text(encoding="utf-8")
    chains: list[list[Example]] = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        example = Example(f"{page.relative_to(ROOT)}:{line}", block[1], block[2])
        if chains and (example.code.startswith(CONTINUES) or SHARED in text[: block.start()]):
            chains[-1].append(example)
        else:
            chains.append([example])
    return chains


def _missing(code: str) -> list[str]:
    """The packages an example imports that are not installed here."""
    names = [
        alias.name if isinstance(node, ast.Import) else node.module or ""
        for node in ast.walk(ast.parse(code))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    packages = dict.fromkeys(name.partition(".")[0] for name in names)
    return [name for name in packages if importlib.util.find_spec(name) is None]


def run(chain: list[Example], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "pasted"}
    for example in chain:
        exec(compile(example.code, example.place, "exec", dont_inherit=True), names)
        printed = capsys.readouterr().out
        assert example.printed in (None, printed), example.place
    return names


CHAINS = {chain[0].place: chain for page in PAGES for chain in _examples(page)}


@pytest.mark.parametrize("place", CHAINS)
def test_examples_run_as_pasted(place, tmp_path, monkeypatch, capsys):
    chain = CHAINS[place]
    if missing := _missing("".join(example.code for example in chain)):
        pytest.skip(f"{', '.join(missing)} not installed")
    monkeypatch.chdir(tmp_path)
    run(chain, capsys)


def test_pages_begin_with_an_example_that_stands_alone():
    first = [chains[0][0].code for page in PAGES if (chains := _examples(page))]
    assert len(first) > 4
    assert not [code for code in first if code.startswith(CONTINUES)]


# what examples compute without printing it
COMPUTED = {
    "docs/checkpoints.md": {"epoch": 3, "in_order": ["weight", "bias"]},
    "docs/schedules.md": {"schedule.last_epoch": 700},
}


@pytest.mark.parametrize("page", COMPUTED)
def test_examples_compute_what_their_page_is_about(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run([example for chain in _examples(ROOT / page) for example in chain], capsys)
    for expression, value in COMPUTED[page].items():
        assert eval(expression, names) == value
