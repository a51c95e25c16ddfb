"""Settings and fixtures that the tests of all frameworks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from . import MISSING

collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Frameworks warn of what they do with torch; only warnings of the order of steps count."""
    mark = pytest.mark.filterwarnings("ignore", "error:Detected call of `lr_sched")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def _by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a seed and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
