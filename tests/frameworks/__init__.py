"""Small trainings in the frameworks themselves, with torch.optim beside stepwell.

`scripts/frameworks` runs them: they need the extra `frameworks`, and are not collected without it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

PACKAGES = (
    "accelerate",
    "jsonargparse",
    "pytorch_lightning",
    "pytorch_optimizer",
    "skorch",
    "timm",
    "torchvision",
    "transformers",
)
MISSING = [name for name in PACKAGES if find_spec(name) is None]

# nothing is downloaded, and nobody is told of a run
os.environ.update(HF_HUB_OFFLINE="1", DISABLE_TELEMETRY="1")


def declare_operators() -> None:
    """Make torchvision importable beside a torch that its library was not built for.

    timm and Lightning import it. Its wheels on PyPI are built for torch with CUDA; a build for the
    CPU cannot load them, and the import fails because two operators are not declared.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor"
            )


declare_operators()
