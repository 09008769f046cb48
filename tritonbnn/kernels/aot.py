"""Compile recorded launches for a GPU that is not there, and read what the compiler made.

Registers, spills and shared memory come from the cubin, instructions from its disassembly; both
tools are in the Triton wheel. Needs TRITON_INTERPRET unset when Triton is imported.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tritonbnn.kernels.launch import Launch, interpreted, recording
from tritonbnn.kernels.targets import Target

_INSTRUCTION = re.compile(r"\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[. ;]")

_AMD_FACT = re.compile(r"^\s+\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", re.MULTILINE)
_AMD_INSTRUCTION = re.compile(r"^\t((?:v|s|ds|global|buffer)_\w+)", re.MULTILINE)

TENSOR_CORE = re.compile(r"^([HIB]G?MMA\b|UTC\w*MMA|V_MFMA|V_WMMA)")

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a GPU, and what it does there."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Counter[str]
    loop: Counter[str]
    """The instructions of the loop with the most tensor-core ones; all, if there is no loop."""

    @property
    def tensor_core(self) -> dict[str, int]:
        """How often each tensor-core instruction occurs, by name without modifiers."""
        return {name: n for name, n in sorted(self.instructions.items()) if TENSOR_CORE.match(name)}

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes from global memory to registers."""
        return self.instructions["LDG.128"]

    @property
    def tensor_core_share(self) -> float:
        """The share of tensor-core instructions in the inner loop."""
        return _tensor_core_count(self.loop) / max(self.loop.total(), 1)


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches that a call on ``meta`` tensors would make."""
    with recording() as launches:
        call()
    return launches


def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compile a launch and read what it takes."""
    compiled = compile_kernel(launch, target)
    name, shared = launch.kernel.__name__, compiled.metadata.shared
    if target.backend == "hip":
        return _read_amdgcn(name, compiled.asm["amdgcn"], shared)
    return _read_cubin(name, compiled.asm["cubin"], shared)


def compile_kernel(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel of a launch, as its arguments specialise it."""
    if interpreted(launch.kernel):
        raise RuntimeError("an interpreted kernel cannot be compiled: unset TRITON_INTERPRET")
    constants, signature, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = _source_type(launch.kernel)(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    gpu = GPUTarget(target.backend, target.architecture, target.warp_size)
    return triton.compile(source, target=gpu, options=options)


def _source_type(kernel: Any) -> type:
    """What the compiler takes a kernel's language for."""
    if not kernel.is_gluon():
        return triton.compiler.ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the instructions, a line each and without addresses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        listing = _tool("nvdisasm", "-c", str(path))
    return *_usage(usage), re.sub(r"/\*.*?\*/", "", listing)


def _read_cubin(kernel: str, cubin: bytes, shared_bytes: int) -> Resources:
    registers, stack, listing = disassemble(cubin)
    names, loops = _parse(listing)
    bodies = [Counter(names[start:end]) for start, end in loops] or [Counter(names)]
    loop = max(bodies, key=lambda body: (_tensor_core_count(body), -body.total()))
    return Resources(kernel, registers, stack, shared_bytes, Counter(names), loop)


def _read_amdgcn(kernel: str, assembly: str, shared_bytes: int) -> Resources:
    """What AMD's compiler says of a kernel at the end of its assembly.

    A kernel without arrays has a private segment for spilled registers only.
    """
    facts = dict(_AMD_FACT.findall(assembly))
    if len(facts) < 2:
        raise RuntimeError(f"the compiler reported no registers of {kernel}")
    names = Counter(name.upper() for name in _AMD_INSTRUCTION.findall(assembly))
    registers, stack = int(facts["vgpr_count"]), int(facts["private_segment_fixed_size"])
    return Resources(kernel, registers, stack, shared_bytes, names, names)


def _parse(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a disassembly by name, and its loops as [start, end) among them.

    Names have no modifiers, but that loads of 16 bytes are ``LDG.128``.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.match(line):
            wide = found[1] == "LDG" and ".128" in line
            names.append("LDG.128" if wide else found[1])
            jump = re.search(r"`\((\.L\w+)\)", line) if found[1] == "BRA" else None
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(names)))
    # Every kernel ends in a branch to itself, which fills its last line.
    return names, [(start, end) for start, end in loops if end - start > 1]


def _tensor_core_count(names: Counter[str]) -> int:
    return sum(count for name, count in names.items() if TENSOR_CORE.match(name))


def _usage(text: str) -> tuple[int, int]:
    """Registers and bytes of stack. Kernels have no arrays, so a stack holds spills only."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {text!r}")
    return int(found[1]), int(found[2])


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
