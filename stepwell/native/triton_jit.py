"""Turn Triton source into kernels: compiled for a GPU, or interpreted on a CPU.

Triton keeps what it compiled on disk (`TRITON_CACHE_DIR`). With
TRITON_INTERPRET=1 the same source runs on the CPU, slowly, block by block in NumPy.
"""

from __future__ import annotations

import hashlib
import linecache
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

__all__ = ["OPTIONS", "is_interpreting", "load", "options", "unusable"]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""How every kernel is compiled; a fusion would depend on what stands around an operation."""

# on NVIDIA's GPUs, the library's functions are to keep subnormal numbers
FOR_NVIDIA = {"enable_reflect_ftz": False}

# the compilers that Triton needs for tensors on such a device
COMPILERS = {"cuda": ("nvidia", "amd"), "xpu": ("intel",)}
# Triton's own minimum among NVIDIA's GPUs
CAPABILITY = (7, 5)


@cache
def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; fixed when Triton is first needed."""
    if not os.environ.get("TRITON_INTERPRET"):
        return False
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@cache
def unusable(device: torch.device) -> str | None:
    """Why Triton cannot work on a device's tensors, or None."""
    if is_interpreting():
        return None if device.type == "cpu" else "Triton's interpreter works on the CPU"
    if device.type not in COMPILERS:
        return f"no compiler of Triton for {device.type}"
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if not any(name in triton.backends.backends for name in COMPILERS[device.type]):
        return f"this Triton has no compiler for {device.type}"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        # no C compiler, no driver: whatever it is, others can do the step
        return f"Triton does not work here: {error}"
    if device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            return f"compute capability {found[0]}.{found[1]}, Triton needs 7.5"
    return None


@cache
def _for_nvidia() -> dict[str, Any]:
    from triton.backends.nvidia.compiler import CUDAOptions

    return {n: v for n, v in FOR_NVIDIA.items() if n in CUDAOptions.__dataclass_fields__}


def options(kind: str) -> dict[str, Any]:
    """How kernels are compiled for a kind of device: "cuda", "hip" or "xpu"."""
    return OPTIONS | (_for_nvidia() if kind == "cuda" else {})


@cache
def load(text: str, name: str) -> Mapping[str, Any]:
    """The functions of a module of Triton source, by name.

    Triton reads a function's source again through `inspect`, which finds it in `linecache`.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    # the name goes into what Triton compiles, where quotes would end a string
    plain = re.sub(r"[^\w+]", "_", name)
    filename = f"<stepwell {plain} {digest}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": f"stepwell.generated_{digest}"}
    exec(compile(text, filename, "exec"), namespace)
    if is_interpreting():
        namespace |= _interpreted()
    return namespace


@cache
def _interpreted() -> dict[str, Any]:
    """What Triton's interpreter lacks, or does differently than a GPU: it truncates to bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def made(data: Any, kind: Any, like: Any) -> Any:
        shape = list(like.shape)
        return tl.tensor(TensorHandle(data, kind), tl.block_type(kind, shape) if shape else kind)

    def on_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
        def lifted(*args: Any) -> Any:
            like = max(args, key=lambda arg: arg.handle.data.size)
            return made(function(*(arg.handle.data for arg in args)), like.dtype, like)

        return lifted

    def to_bfloat16(x: Any) -> Any:
        bits = x.handle.data.view(np.uint32)
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        kept = np.where(np.isnan(x.handle.data), (bits >> 16) | 64, rounded)
        return made(kept.astype(np.uint16), tl.bfloat16, x)

    functions = {"pow": np.power, "exp": np.exp, "log": np.log, "atan2": np.arctan2}
    lifted = {name: on_numpy(function) for name, function in functions.items()}
    return {"libdevice": SimpleNamespace(**lifted), "to_bfloat16": to_bfloat16}
