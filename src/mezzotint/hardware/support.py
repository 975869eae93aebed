"""Which number formats a device computes in: natively, by emulation, or not at all, and why.

The rules read facts, never torch's own answer: `torch.cuda.is_bf16_supported()` says yes on a T4, where every bfloat16
product is computed through float32 and slower than it (pytorch issue 148322). Nor are facts enough: a library may
lack the kernel for an instruction that the chip has. So a measurement, where there is one, has the last word.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from mezzotint.formats.catalog import find_format
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.hardware.timings import MatmulTimings, Speed, matmul_speed, spell_ratios

REPORTED_FORMATS = (
    "float64",
    "float32",
    "tfloat32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
)


class Support(StrEnum):
    """What a device does with a format."""

    NATIVE = "native"  # units that multiply it
    EMULATED = "emulated"  # it runs, converted to a wider format first
    ABSENT = "absent"  # it does not run
    UNKNOWN = "unknown"  # the facts do not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What is known about a device; None, or an empty tuple, is "unknown", never "no".

    `kind` is torch's device type. `compute_capability` is NVIDIA's, `architecture` AMD's ("gfx942") or the instruction
    set of a CPU ("x86_64", "aarch64"). `flags` name instruction-set extensions of a CPU, in the words of torch or of
    the kernel, or capabilities of an Intel GPU. `threads` are those torch computes with, `usable_cores` what affinity
    and container limits leave. `claims_bfloat16` is torch's own answer. `os_version` matters to Apple's GPUs only.
    `is_here` says that the device was probed in this process, so that it can be measured.
    """

    kind: str
    index: int | None = None
    name: str = "unknown"
    compute_capability: tuple[int, int] | None = None
    architecture: str | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    flags: tuple[str, ...] = ()
    threads: int | None = None
    physical_cores: int | None = None
    usable_cores: float | None = None
    torch_version: str | None = None
    cuda_version: str | None = None
    hip_version: str | None = None
    driver: str | None = None
    os_version: tuple[int, ...] | None = None
    claims_bfloat16: bool | None = None
    is_here: bool = False

    @property
    def device(self) -> str:
        """The device as torch spells it: "cpu", "cuda:0"."""
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    @property
    def is_rocm(self) -> bool:
        """Whether this is an AMD GPU, which torch calls cuda."""
        return self.kind == "cuda" and (self.hip_version is not None or (self.architecture or "").startswith("gfx"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSupport:
    """What a device does with one format, and why; `measured_ratio` is its matmul time over float32's, at worst."""

    format: str
    support: Support
    reason: str
    measured_ratio: float | None = None


def facts_from_spec(spec: DeviceSpec) -> DeviceFacts:
    """Return the facts that the device table states, for a device that is not in this machine."""
    return DeviceFacts(
        kind="mps" if spec.vendor == "Apple" else "cuda",
        index=None if spec.vendor == "Apple" else 0,
        name=spec.device_names[0],
        compute_capability=spec.compute_capability,
        architecture=spec.architecture,
        memory_bytes=spec.memory_bytes,
    )


def format_support(facts: DeviceFacts, format_name: str, timings: MatmulTimings | None = None) -> FormatSupport:
    """Return what the device does with a format, by its name or alias; `timings` of the device overrule the rules.

    >>> t4 = DeviceFacts(kind="cuda", index=0, name="Tesla T4", compute_capability=(7, 5))
    >>> format_support(t4, "bf16").support
    <Support.EMULATED: 'emulated'>

    Raises FormatError for an unknown format.
    """
    name = find_format(format_name).name
    rule = _RULES.get("rocm" if facts.is_rocm else facts.kind)
    verdict = rule(facts, name) if rule else _Verdict(Support.UNKNOWN, f"no rules for {facts.kind} devices")
    if timings is not None:
        verdict = _overrule(verdict, name, timings)
    ratio = None if timings is None else timings.worst_ratio(name)
    return FormatSupport(format=name, support=verdict.support, reason=verdict.reason, measured_ratio=ratio)


def support_table(facts: DeviceFacts, timings: MatmulTimings | None = None) -> tuple[FormatSupport, ...]:
    """Return what the device does with each format that training uses, widest first."""
    return tuple(format_support(facts, name, timings) for name in REPORTED_FORMATS)


class _Verdict(NamedTuple):
    support: Support
    reason: str


def _native(reason: str) -> _Verdict:
    return _Verdict(Support.NATIVE, reason)


def _emulated(reason: str) -> _Verdict:
    return _Verdict(Support.EMULATED, reason)


def _absent(reason: str) -> _Verdict:
    return _Verdict(Support.ABSENT, reason)


def _unknown(reason: str) -> _Verdict:
    return _Verdict(Support.UNKNOWN, reason)


def _overrule(verdict: _Verdict, name: str, timings: MatmulTimings) -> _Verdict:
    """Return the verdict after what was measured: only there does a kernel prove that it exists."""
    refusals = dict(timings.refused)
    # float8 has a product of its own in torch, so that a plain one is refused says nothing
    if name in refusals and "float32" not in refusals and find_format(name).bits > 8:
        return _absent(f"torch refuses the product: {refusals[name]}")
    speed = matmul_speed(timings, name)
    if speed is None or timings.is_disturbed or find_format(name).bits >= 32:  # float64 may be native and slower
        return verdict
    ratios = spell_ratios(timings.ratios(name))
    if verdict.support is Support.NATIVE and speed is Speed.SLOWER:
        return _emulated(f"{verdict.reason}, but no fast kernel is used here: matmul takes {ratios}")
    if verdict.support is Support.UNKNOWN and speed is Speed.FASTER:
        return _native(f"matmul takes {ratios}, which only native units reach; {verdict.reason}")
    if verdict.support is Support.UNKNOWN and speed is Speed.SLOWER:
        return _emulated(f"matmul takes {ratios}; {verdict.reason}")
    return verdict


def _cuda(facts: DeviceFacts, name: str) -> _Verdict:
    capability = facts.compute_capability
    if name == "float32":
        return _native("CUDA cores")
    if capability is None:
        return _unknown("the compute capability is not known")
    return _CUDA_RULES[name](facts, capability) if name in _CUDA_RULES else _absent("torch has no product in it")


def _number(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _cc(capability: tuple[int, int]) -> str:
    return f"compute capability {_number(capability)}"


def _cuda_float64(facts: DeviceFacts, capability: tuple[int, int]) -> _Verdict:
    divisor = _FLOAT64_DIVISOR.get(capability)
    rate = f"1/{divisor} of float32's rate" if divisor else "CUDA cores"
    return _native(f"{rate} on {_cc(capability)}" if divisor else rate)


# results per clock and multiprocessor, float32 over float64 (CUDA programming guide, arithmetic instructions)
_FLOAT64_DIVISOR = {
    (5, 0): 32,
    (5, 2): 32,
    (5, 3): 32,
    (6, 0): 2,
    (6, 1): 32,
    (6, 2): 32,
    (7, 0): 2,
    (7, 5): 32,
    (8, 0): 2,
    (8, 6): 64,
    (8, 9): 64,
    (9, 0): 2,
    (12, 0): 64,
}


def _cuda_tfloat32(facts: DeviceFacts, capability: tuple[int, int]) -> _Verdict:
    if capability >= (8, 0):
        return _native("tensor cores, from compute capability 8.0")
    return _absent(f"needs compute capability 8.0, this is {_number(capability)}; allow_tf32 has no effect")


def _cuda_bfloat16(facts: DeviceFacts, capability: tuple[int, int]) -> _Verdict:
    if capability >= (8, 0):
        return _native("tensor cores, from compute capability 8.0")
    claim = ", whatever is_bf16_supported() says" if facts.claims_bfloat16 is not False else ""
    return _emulated(f"computed through float32 below compute capability 8.0, this is {_number(capability)}{claim}")


def _cuda_float16(facts: DeviceFacts, capability: tuple[int, int]) -> _Verdict:
    if capability == (7, 5) and re.search(r"GTX 16\d\d", facts.name):
        return _native("twice float32's rate, without tensor cores, which the GTX 16 series lacks")
    if capability >= (7, 0):
        return _native("tensor cores, from compute capability 7.0")
    if capability in {(5, 3), (6, 0), (6, 2)}:
        return _native(f"twice float32's rate on {_cc(capability)}, without tensor cores")
    if capability == (6, 1):
        return _emulated("arithmetic at 1/64 of float32's rate on compute capability 6.1: good for storage only")
    return _emulated(f"{_cc(capability)} stores it and computes in float32")


def _cuda_float8(facts: DeviceFacts, capability: tuple[int, int]) -> _Verdict:
    if capability >= (8, 9):
        return _native("tensor cores, from compute capability 8.9")
    return _absent(f"needs compute capability 8.9, this is {_number(capability)}; it can be stored")


_CUDA_RULES: dict[str, Callable[[DeviceFacts, tuple[int, int]], _Verdict]] = {
    "float64": _cuda_float64,
    "tfloat32": _cuda_tfloat32,
    "bfloat16": _cuda_bfloat16,
    "float16": _cuda_float16,
    "float8_e4m3fn": _cuda_float8,
    "float8_e5m2": _cuda_float8,
}

# AMD's families, by what their matrix units multiply (ROCm documentation, "Data types and precision support")
_MFMA = ("gfx908", "gfx90a", "gfx94", "gfx95")  # CDNA 1 to 4
_WMMA = ("gfx11", "gfx12")  # RDNA 3 and 4


def _rocm(facts: DeviceFacts, name: str) -> _Verdict:
    # the driver appends features: "gfx90a:sramecc+:xnack-"
    arch = (facts.architecture or "").partition(":")[0]
    if name in ("float64", "float32"):
        return _native("vector units" if not arch.startswith(_MFMA) else "vector and matrix units")
    if not arch:
        return _unknown("the GPU's architecture (gfx...) is not known")
    if name in ("bfloat16", "float16"):
        if arch.startswith(_MFMA + _WMMA):
            half_rate = ", at half the float16 rate" if (name, arch) == ("bfloat16", "gfx908") else ""
            return _native(f"matrix units of {arch}{half_rate}")
        if name == "float16":
            return _native(f"packed arithmetic of {arch}, without matrix units")
        return _emulated(f"{arch} has no bfloat16 units; torch says yes for every AMD GPU")
    if name == "tfloat32":
        if arch.startswith("gfx94"):
            return _native(f"matrix units of {arch} (XF32)")
        return _absent(f"only gfx94x has it in hardware, this is {arch}")
    if name in ("float8_e4m3fn", "float8_e5m2"):
        if arch.startswith(("gfx95", "gfx12")):
            return _native(f"matrix units of {arch}")
        if arch.startswith("gfx94"):
            return _absent(f"{arch} multiplies the fnuz variants of float8, not these")
        return _absent(f"{arch} has no float8 units; it can be stored")
    return _absent("torch has no product in it")


_BFLOAT16_FLAGS = {
    "amx_bf16": "AMX tiles, amx_bf16",
    "avx10_2": "AVX10.2 products, avx10_2",
    "avx512_bf16": "AVX-512 dot products, avx512_bf16",
    "sve_bf16": "SVE matrix products, sve_bf16",
    "svebf16": "SVE matrix products, svebf16",
    "bf16": "Arm matrix products, bf16",
}
_FLOAT16_FLAGS = {
    "amx_fp16": "AMX tiles, amx_fp16",
    "avx512_fp16": "AVX-512 arithmetic, avx512_fp16",
    "fp16_arith": "Arm arithmetic, fp16_arith",
    "asimdhp": "Arm arithmetic, asimdhp",
}


def _cpu(facts: DeviceFacts, name: str) -> _Verdict:
    if name in ("float64", "float32"):
        return _native("every CPU")
    if name == "tfloat32":
        return _absent("a mode of tensor cores; this is a CPU")
    if name not in ("bfloat16", "float16"):
        return _emulated("stored in it, computed in a wider format")
    words = _BFLOAT16_FLAGS if name == "bfloat16" else _FLOAT16_FLAGS
    units = next((words[flag] for flag in words if flag in facts.flags), None)
    if units is not None:
        return _native(units)
    if not facts.flags:
        return _unknown("the instruction set could not be read")
    if name == "bfloat16":
        return _emulated("no bfloat16 instructions (AMX, AVX512-BF16, Arm BF16): computed through float32")
    converts = "; f16c only converts" if "f16c" in facts.flags else ""
    return _emulated(f"no float16 arithmetic (AMX-FP16, AVX512-FP16, Arm FP16){converts}")


def _mps(facts: DeviceFacts, name: str) -> _Verdict:
    if name == "float64":
        return _absent("Metal has no float64")
    if name in ("float32", "float16"):
        return _native("Metal")
    if name != "bfloat16":
        return _absent("Metal has no product in it")
    if facts.architecture in ("x86_64", "AMD64"):
        return _absent("Metal offers bfloat16 on Apple's own chips only")
    if facts.os_version is None:
        return _unknown("the version of macOS is not known; bfloat16 needs 14")
    if facts.os_version < (14,):
        version = ".".join(map(str, facts.os_version))
        return _absent(f"Metal offers bfloat16 from macOS 14, this is {version}")
    return _native("Metal, from macOS 14; how fast depends on the chip")


def _xpu(facts: DeviceFacts, name: str) -> _Verdict:
    if name == "float32":
        return _native("vector engines")
    if not facts.flags:
        return _unknown("the device's capabilities could not be read")
    has_matrix_engines = "has_subgroup_matrix_multiply_accumulate" in facts.flags
    if name == "float64":
        return _native("vector engines") if "has_fp64" in facts.flags else _absent("the device has no float64")
    if name == "tfloat32":
        if "has_subgroup_matrix_multiply_accumulate_tensor_float32" in facts.flags:
            return _native("matrix engines (XMX)")
        return _absent("the matrix engines do not offer it")
    if name == "bfloat16":
        return _native("matrix engines (XMX)") if has_matrix_engines else _emulated("no matrix engines (XMX)")
    if name == "float16":
        if has_matrix_engines:
            return _native("matrix engines (XMX)")
        return _native("vector engines") if "has_fp16" in facts.flags else _emulated("no float16 arithmetic")
    return _absent("torch has no product in it on this device")


_RULES: dict[str, Callable[[DeviceFacts, str], _Verdict]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "rocm": _rocm,
    "mps": _mps,
    "xpu": _xpu,
}
