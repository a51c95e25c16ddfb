"""Do the examples run, and does each page of docs/frameworks show its example and run as pasted?"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from ..test_documentation import CHAINS, run

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
PRINTS = {
    "accelerate_loop": r"loss: 0\.5\d+\nresumed to the same weights: True\n",
    "hf_trainer": r"(?s).*mean loss: 1\.\d+\n.*resumed to the same weights: True\n",
    "lightning_module": r"(?s).*loss: 0\.\d+\n.*resumed to the same weights: True\n",
    "skorch_net": r"best: {'lr': 0\.01, 'module__width': \d+}, accuracy: 0\.9\d\n",
    "timm_factory": r"8 groups, loss: 0\.\d+\n",
}
PAGES = {
    "accelerate_loop": "accelerate",
    "hf_trainer": "hf-trainer",
    "lightning_module": "lightning",
    "skorch_net": "skorch",
    "timm_factory": "timm",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES[name]))
    assert re.fullmatch(PRINTS[name], capsys.readouterr().out)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_page_shows_it(name: str) -> None:
    page = (ROOT / "docs" / "frameworks" / f"{PAGES[name]}.md").read_text()
    assert f"```python\n{EXAMPLES[name].read_text()}```\n" in page


@pytest.mark.parametrize("place", [place for place in CHAINS if "docs/frameworks/" in place])
def test_a_page_runs_as_pasted(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(CHAINS[place], capsys)
