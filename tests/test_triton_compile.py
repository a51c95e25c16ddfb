"""What do the kernels for GPUs compile to? All of them, for every kind of number, without a GPU.

Triton translates them to PTX for Hopper, where each operation and each access to memory can be
counted; NVIDIA's assembler, which Triton brings, makes machine code of that, and says what a
kernel needs of a processor. The generated text of three rules is kept in `golden`: when it is meant
to change, `python -m tests.test_triton_compile` writes it anew.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import stepwell
from stepwell.backends.triton import BLOCK, ROWS
from stepwell.language import Program, program_for, trace
from stepwell.language.expr import Kind
from stepwell.native.reading import slots_of
from stepwell.native.triton_jit import OPTIONS, is_interpreting, load, options
from stepwell.native.triton_source import SUPPORTED, Source

from .cases import FLOATS, PLAIN, SIZES, Case, Shapes, named, parameters, per_element, train
from .rules import LAMB, RULES

triton = pytest.importorskip("triton", reason="it is Triton that compiles the kernels")

pytestmark = pytest.mark.skipif(
    is_interpreting(), reason="with TRITON_INTERPRET=1 nothing is compiled"
)

GOLDEN = Path(__file__).parent / "golden"

HOPPER = triton.backends.compiler.GPUTarget("cuda", 90, 32)
CDNA3 = triton.backends.compiler.GPUTarget("hip", "gfx942", 64)

THREADS = HOPPER.warp_size * OPTIONS["num_warps"]
# what one thread computes of a block
ELEMENTS = BLOCK // THREADS
# bytes of the widest access to memory
WIDEST = 16
# a sweep computes whole blocks, and once more, masked, what is left of them or not aligned
LOOPS = 2

REGISTERS = {"float": 96, "double": 168}
ROWS_REGISTERS = 64
"""The registers of a thread. A multiprocessor has 65,536: 5 programs of 128 threads fit with 96, 3
with 168, 8 with 64. What needs the most reads four slots and more, so that 5 programs have 41 KB on
their way. An H200 is busy with 25 KB: 4.8 TB/s for 0.7 µs, divided by 132 multiprocessors.
"""

# these come from a library, with operations of its own
FROM_LIBRARY = {"pow", "exp", "log", "atan2"}

# What is not as it should be, and why.
SPILLED = {("Adan", "mixed"): "8 bytes wait in memory, from before the loops until after them"}

TABLES = {
    **dict.fromkeys(("chunks", "addresses", "groups", "first_chunk"), torch.int64),
    **dict.fromkeys(
        ("numbers", "hyperparameters", "numels", "partials", "reductions"), torch.float64
    ),
    "found_inf": torch.float32,
}
POINTERS = {torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32"}
SIGNATURE = {
    **{name: POINTERS[dtype] for name, dtype in TABLES.items()},
    "rows": "i32",
    "BLOCK": "constexpr",
}


# What is compiled

# the dtype of parameter and gradient, and that of the state
DTYPES = {str(dtype).removeprefix("torch."): (dtype, dtype) for dtype in FLOATS}
DTYPES["mixed"] = torch.bfloat16, torch.float32


def _source_of(program: Program, dtypes: str, *, on_device: bool) -> Source:
    param, state = DTYPES[dtypes]
    used = {str(n.value) for n in program.nodes if n.op == "state"} | program.outputs.keys()
    slots = {
        name: torch.float32 if slot.scalar else state
        for name, slot in program.slots.items()
        if name in used
    }
    return Source(program, {"param": param, **slots, "grad": param}, on_device=on_device)


def _rules() -> Iterator[tuple[str, Program]]:
    """Each rule in a later step; and in its first, where what starts unset is absent."""
    plain = [(case.name, case.rule.formula, case.options) for case in per_element(PLAIN)]
    for name, formula, flags in (*plain, *((r.__name__, r.formula, {}) for r in RULES)):
        yield name, program_for(formula, flags)
        unset = frozenset(entry for entry, slot in formula.slots.items() if slot.initial is None)
        yield f"{name}, first step", program_for(formula, flags, unset)
    yield "AdamW, scaled", program_for(stepwell.AdamW.formula, {"grad_scale": 2.0})


def _distinct(programs: Iterable[tuple[str, Program]]) -> dict[str, Program]:
    """The programs that can be compiled, by name, one of those with equal kernels."""
    found: dict[tuple[str, ...], tuple[str, Program]] = {}
    for name, program in programs:
        if program.ops <= SUPPORTED:
            # float64 keeps divisions that the others make products of
            sources = (_source_of(program, d, on_device=True) for d in ("float32", "float64"))
            found.setdefault(tuple(source.text() for source in sources), (name, program))
    return dict(found.values())


# flags change what is computed, which the tests of numbers see, and not how memory is gone over
PROGRAMS = _distinct(_rules())
SUBJECTS = [
    (name, dtypes)
    for name, program in PROGRAMS.items()
    for dtypes in DTYPES
    if dtypes != "mixed" or program.element_slots
]
# with numbers on the device, sweeps have one condition more, and rows_0 always has float64 within
ON_DEVICE = ("float32", "float64")


# Compiling

OPERATION = re.compile(r"^\s+(@!?%p\d+\s+)?([a-z][\w.:]*)", re.MULTILINE)
USAGE = re.compile(r"(REG|STACK|LOCAL):(\d+)")


class Kernel(NamedTuple):
    """A kernel in machine code: its PTX, and what the assembler says that it needs."""

    source: Source
    name: str
    ptx: str
    usage: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.name} with numbers on the {'device' if self.source.on_device else 'host'}"

    @property
    def sweep(self) -> int:
        return int(self.name.rpartition("_")[2])

    @property
    def is_sweep(self) -> bool:
        return self.name.startswith("sweep")

    def operations(self) -> Counter[str]:
        """How often each operation occurs, with an @ where it depends on a condition."""
        code, *_ = self.ptx.partition(".section")
        return Counter("@" * bool(guard) + name for guard, name in OPERATION.findall(code))


@dataclass(frozen=True)
class Compiled:
    """All kernels of a program for one kind of number."""

    program: str
    dtypes: str
    kernels: Sequence[Kernel]

    @property
    def sweeps(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.is_sweep]


def _stages(source: Source) -> list[str]:
    """The names of the kernels that the back-end launches."""
    parts = {"rows": source.has_rows, "sweep": source.has_sweep, "reduce": source.reductions_at}
    return [f"{part}_{k}" for k in range(source.sweeps) for part, has in parts.items() if has(k)]


def _compile(source: Source, name: str, target: Any) -> Any:
    kernel = load(source.text(), source.program.name)[name]
    block = BLOCK if name.startswith("sweep") else ROWS
    signature = {argument: SIGNATURE[argument] for argument in kernel.arg_names}
    asked = triton.compiler.ASTSource(kernel, signature, constexprs={"BLOCK": block}, attrs={})
    return triton.compile(asked, target=target, options=options(target.backend))


def _usage(machine_code: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(machine_code)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in USAGE.findall(found)}


def _compile_for_hopper(job: tuple[Source, str]) -> Kernel:
    made = _compile(*job, HOPPER)
    return Kernel(*job, made.asm["ptx"], _usage(made.asm["cubin"]))


def _jobs(program: Program, dtypes: str) -> list[tuple[Source, str]]:
    sources = [_source_of(program, dtypes, on_device=False)]
    if dtypes in ON_DEVICE:
        sources.append(_source_of(program, dtypes, on_device=True))
    return [(source, name) for source in sources for name in _stages(source)]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache() -> Iterator[None]:
    """Triton's cache, empty at first and gone in the end."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        yield


# each subject's tests follow one another, so that one subject's kernels are in memory at a time
@pytest.fixture(scope="module", params=SUBJECTS, ids=[f"{name}-{d}" for name, d in SUBJECTS])
def compiled(request: pytest.FixtureRequest, fresh_cache: None) -> Compiled:
    name, dtypes = request.param
    # one after the other: parsing in several threads at a time is what CPython 3.11 cannot do
    kernels = tuple(map(_compile_for_hopper, _jobs(PROGRAMS[name], dtypes)))
    return Compiled(name, dtypes, kernels)


def _expect(
    known: Mapping[tuple[str, str], str], compiled: Compiled, request: pytest.FixtureRequest
) -> None:
    """Let the test fail, and nothing but fail, for what is known to be amiss."""
    reason = known.get((compiled.program, compiled.dtypes))
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


# Memory


def _read(kernel: Kernel) -> list[str]:
    wanted = kernel.source.wanted(kernel.sweep)
    return [str(n.value) for n in wanted if n.kind is Kind.ELEMENT and not n.args]


def test_whole_blocks_move_in_the_widest_accesses(compiled: Compiled) -> None:
    for kernel in compiled.sweeps:
        operations = kernel.operations()
        moved = {"ld": _read(kernel), "st": list(kernel.source.stores_at(kernel.sweep))}
        for access, names in moved.items():
            vectors = re.compile(rf"@?{access}\.global\.v")
            found = {name: count for name, count in operations.items() if vectors.match(name)}
            sizes = [kernel.source.dtypes[name].itemsize for name in names]
            # those of 16 bytes, and none with a condition
            assert found.keys() <= {f"{access}.global.v4.b32", f"{access}.global.v2.b64"}, kernel
            assert sum(found.values()) == sum(ELEMENTS * s // WIDEST for s in sizes), kernel


def test_the_rest_moves_element_by_element(compiled: Compiled) -> None:
    for kernel in compiled.sweeps:
        operations = kernel.operations()
        sizes = Counter(kernel.source.dtypes[name].itemsize for name in _read(kernel))
        found = {size: operations[f"@ld.global.b{8 * size}"] for size in sizes}
        assert found == {size: ELEMENTS * count for size, count in sizes.items()}, kernel


def test_nothing_is_kept_in_local_memory(
    compiled: Compiled, request: pytest.FixtureRequest
) -> None:
    _expect(SPILLED, compiled, request)
    for kernel in compiled.kernels:
        assert kernel.usage["STACK"] == kernel.usage["LOCAL"] == 0, kernel
        assert ".local" not in kernel.ptx, kernel


def test_registers_leave_room_for_other_programs(compiled: Compiled) -> None:
    for kernel in compiled.kernels:
        limit = REGISTERS[kernel.source.kind] if kernel.is_sweep else ROWS_REGISTERS
        assert kernel.usage["REG"] <= limit, kernel


def test_threads_wait_for_each_other_only_to_reduce_and_to_store(compiled: Compiled) -> None:
    # A thread reads 16 bytes of the narrowest slot, and stores 16 of each: where another slot is
    # wider, Triton hands results from thread to thread.
    for kernel in compiled.sweeps:
        stored = kernel.source.stores_at(kernel.sweep)
        widths = {kernel.source.dtypes[name].itemsize for name in stored}
        exchanges = bool(kernel.source.reductions_at(kernel.sweep)) or len(widths) > 1
        assert ("bar.sync" in kernel.operations()) is exchanges, kernel


# Arithmetic


def test_operations_are_those_of_the_formula(compiled: Compiled) -> None:
    for kernel in compiled.sweeps:
        source, found = kernel.source, kernel.operations()
        ops = Counter(n.op for n in source.wanted(kernel.sweep) if n.kind is Kind.ELEMENT)
        if not FROM_LIBRARY.isdisjoint(ops):
            continue
        kind = {"float": "f32", "double": "f64"}[source.kind]
        for op in ("fma", "div", "sqrt"):
            assert found[f"{op}.rn.{kind}"] == LOOPS * ELEMENTS * ops[op], (kernel, op)


def test_every_operation_rounds_to_nearest(compiled: Compiled) -> None:
    # without a rounding of its own, an addition may become part of a fused one
    wrong = re.compile(r"\.(approx|full|ftz)\b|^@?(add|sub|mul)\.b?f\d")
    for kernel in compiled.sweeps:
        assert not [name for name in kernel.operations() if wrong.search(name)], kernel


# Other targets


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_they_compile_for_amd_too(case: Case, dtypes: str) -> None:
    jobs = _jobs(program_for(case.rule.formula, case.options), dtypes)
    made = [_compile(*job, CDNA3).asm["amdgcn"] for job in jobs]
    for (_, name), code in zip(jobs, made, strict=True):
        assert f".amdhsa_kernel {name}" in code
        assert re.search(r"\.vgpr_spill_count: +0$", code, re.MULTILINE), name


# What a kernel is compiled anew for


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_specialized(name: str) -> None:
    for source, stage in _jobs(PROGRAMS[name], "float32"):
        kernel = load(source.text(), source.program.name)[stage]
        *tables, block = kernel.params
        assert block.name == "BLOCK"
        assert block.is_constexpr
        for table in tables:
            assert table.do_not_specialize, (stage, table.name)
            assert table.do_not_specialize_on_alignment, (stage, table.name)


@pytest.mark.parametrize("rows", [1, 2, 16, 1000])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("target", [HOPPER, CDNA3], ids=["cuda", "hip"])
def test_a_kernel_is_chosen_by_the_types_of_its_tables_alone(
    target: Any, offset: int, rows: int
) -> None:
    backend = triton.compiler.make_backend(target)
    given = {
        name: torch.zeros(rows + offset, dtype=dtype)[offset:] for name, dtype in TABLES.items()
    }
    for source, stage in _jobs(program_for(LAMB.formula, {}), "float32"):
        kernel = load(source.text(), source.program.name)[stage]
        choose = triton.runtime.jit.create_function_from_signature(
            kernel.signature, kernel.params, backend
        )
        *names, _ = kernel.arg_names
        tables = {name: {"rows": rows, **given}[name] for name in names}
        _, chosen, _ = choose(**tables, BLOCK=BLOCK)
        types = [(SIGNATURE[name], None) for name in names]
        assert chosen == [*types, ("constexpr", BLOCK)], stage


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("rule", "rates", "others"),
    [
        (stepwell.SGD, {"lr": 0.1}, {"lr": 1e-9}),
        (stepwell.SGD, {"momentum": 0.9}, {"momentum": 0.1, "lr": torch.tensor(2.0)}),
        (stepwell.Adam, {"lr": 0.02}, {"lr": 7.0, "betas": (0.0, 0.5), "eps": 1.0}),
        (stepwell.AdamW, {}, {"lr": 0.0, "weight_decay": 3.0}),
        (stepwell.AdamW, {"grad_scale": 1.0}, {"grad_scale": 65536.0}),
    ],
)
def test_other_rates_have_the_same_kernels(
    rule: Any, rates: Mapping[str, Any], others: Mapping[str, Any], on_device: bool
) -> None:
    formula = rule.formula
    defaults = {name: field.default for name, field in formula.fields.items()}
    # traced twice, though the package would find the first program again
    programs = [trace(formula, {**defaults, **group}) for group in (rates, others)]
    first, second = (
        load(_source_of(program, "float32", on_device=on_device).text(), formula.name)
        for program in programs
    )
    assert first is second


@pytest.mark.parametrize("case", **named(per_element(PLAIN)))
def test_other_tensors_have_the_same_kernels(case: Case) -> None:
    def text(shapes: Shapes) -> str:
        optimizer = train(case.make, parameters(shapes, torch.float32), 2)
        (launch,) = optimizer._held[0]._launches
        cohort = launch.cohort
        return Source(cohort.program, slots_of(cohort), on_device=False).text()

    expected = _source_of(
        program_for(case.rule.formula, case.options), "float32", on_device=False
    ).text()
    assert text(((3,),)) == text(SIZES) == expected


# The generated text

FROZEN = {
    "sgd_momentum_bfloat16": _source_of(
        program_for(stepwell.SGD.formula, {"momentum": 0.9}), "bfloat16", on_device=False
    ),
    "adamw_float32_on_device": _source_of(
        program_for(stepwell.AdamW.formula, {}), "float32", on_device=True
    ),
    "lamb_float32": _source_of(program_for(LAMB.formula, {}), "float32", on_device=False),
}


def _golden(name: str) -> Path:
    return GOLDEN / f"{name}.triton.txt"


@pytest.mark.parametrize("name", FROZEN)
def test_the_text_is_as_it_was(name: str) -> None:
    path = _golden(name)
    before, now = path.read_text(encoding="utf-8"), FROZEN[name].text()
    if now != before:
        lines = difflib.unified_diff(
            before.splitlines(), now.splitlines(), path.name, "generated now", lineterm=""
        )
        message = "the text has changed; if it should, run: python -m tests.test_triton_compile"
        pytest.fail("\n".join([message, *lines]), pytrace=False)


if __name__ == "__main__":
    for frozen, source in FROZEN.items():
        _golden(frozen).write_text(source.text(), encoding="utf-8")
