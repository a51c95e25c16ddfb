"""Compile LLVM IR for this machine's processor, in memory."""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from functools import cache
from typing import Any

__all__ = ["Library", "constant", "features", "load", "unusable"]

log = logging.getLogger("stepwell")

_lock = threading.Lock()


def _machine(level: int) -> Any:
    """A machine of its own for each engine, which takes it along when it goes."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=level,
        jit=True,
    )


@cache
def unusable() -> str | None:
    """Why nothing can be compiled here, or None; it is said once, for steps then take longer."""
    try:
        load("define void @nothing() {\n  ret void\n}", optimise=True)
    except ImportError as error:
        reason = f"llvmlite cannot be imported ({error})"
    except Exception as error:
        # no such processor, no memory that may hold code: whatever it is, others can do the step
        reason = f"llvmlite does not work here ({type(error).__name__}: {error})"
    else:
        return None
    log.warning("no native code, steps run on back-end foreach instead: %s", reason)
    return reason


@cache
def features() -> frozenset[str]:
    """What the processor can do, in LLVM's words (`fma`, `f16c`, ...)."""
    import llvmlite.binding as llvm

    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


class Library:
    """Compiled functions; their code lives as long as this object."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def address(self, name: str) -> int:
        """Where the function starts in memory."""
        return int(self._engine.get_function_address(name))


def load(ir: str, *, optimise: bool = True) -> Library:
    """Verify, optimise (-O3, or not at all) and compile a module of LLVM IR."""
    import llvmlite.binding as llvm

    # LLVM's contexts are not made for several threads at once
    with _lock:
        module = llvm.parse_assembly(ir)
        module.verify()
        machine = _machine(3 if optimise else 0)
        if optimise:
            options = llvm.create_pipeline_tuning_options(speed_level=3)
            options.loop_vectorization = options.slp_vectorization = True
            passes = llvm.create_pass_builder(machine, options)
            passes.getModulePassManager().run(module, passes)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
    return Library(engine)


def constant(value: float, kind: str) -> str:
    """A number as LLVM spells it: the bits of a double, rounded first if `kind` is float."""
    if kind == "float":
        value = ctypes.c_float(value).value
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
