"""Asks torch and the system what is here. Nothing raises because a driver is broken: that becomes a problem to report.

Calls that torch keeps private are made through getattr with a default, and their absence means "unknown".
"""

import os
import platform
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from mezzotint.errors import ConfigError, echoed
from mezzotint.hardware import host
from mezzotint.hardware.setup import TorchSetup
from mezzotint.hardware.support import DeviceFacts
from mezzotint.torch_internals.operators import onednn_bfloat16_question

T = TypeVar("T")

# variables that silently change threads, instruction sets, devices or precision
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def probe_devices() -> tuple[DeviceFacts, ...]:
    """Return every device that torch can use, the one to train on first, the CPU last."""
    return _probe([])


def probe(device: str | torch.device | None = None) -> DeviceFacts:
    """Return the facts of a device, such as "cuda:1", or of the one to train on.

    Raises ConfigError for a device that torch cannot use here, naming those that it can.
    """
    problems: list[str] = []
    found = _probe(problems)
    if device is None:
        return found[0]
    wanted = re.fullmatch(r"([a-z]+)(?::(\d+))?", str(device).strip().lower())
    for facts in found:
        if wanted and facts.kind == wanted[1] and (wanted[2] is None or int(wanted[2]) == (facts.index or 0)):
            return facts
    here = ", ".join(facts.device for facts in found)
    why = f" ({problems[0]})" if problems else ""
    raise ConfigError(f"device {echoed(str(device))} cannot be used here{why}; pass one of {here}")


def probe_setup() -> TorchSetup:
    """Return torch's build and settings, and what went wrong while devices were looked for."""
    problems: list[str] = []
    _probe(problems)
    return TorchSetup(
        torch_version=str(torch.__version__),
        python_version=platform.python_version(),
        cuda_version=torch.version.cuda,
        hip_version=getattr(torch.version, "hip", None),
        cuda_archs=tuple(_ask(torch.cuda.get_arch_list, [])),
        # torch refuses to tell after its older and newer precision switches were mixed
        matmul_precision=_ask(torch.get_float32_matmul_precision, "unknown"),
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        usable_cores=host.usable_cores(),
        physical_cores=host.physical_cores(),
        environment=tuple((name, os.environ[name]) for name in _VARIABLES if name in os.environ),
        has_nvidia_device=host.has_nvidia_device(),
        nvidia_driver=host.nvidia_driver(),
        problems=tuple(problems),
    )


def _probe(problems: list[str]) -> tuple[DeviceFacts, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = (*_gpus("cuda", problems), *_gpus("xpu", problems), *_mps(problems), _cpu())
    problems.extend(_first_line(str(w.message)) for w in caught if w.category is UserWarning)
    return tuple(replace(facts, torch_version=str(torch.__version__), is_here=True) for facts in found)


def _ask(question: Callable[[], T], default: T) -> T:
    """Return what torch answers, or the default where the question raises or does not exist."""
    try:
        return question()
    except Exception:  # any error of any driver: the answer is unknown, and that is all we want to know
        return default


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(".")


def _gpus(kind: str, problems: list[str]) -> tuple[DeviceFacts, ...]:
    module: Any = getattr(torch, kind, None)
    read = {"cuda": _cuda_facts, "xpu": _xpu_facts}[kind]
    found = []
    try:
        count = module.device_count() if module is not None and module.is_available() else 0
    except Exception as error:
        problems.append(f"torch.{kind} failed: {_first_line(str(error)) or type(error).__name__}")
        return ()
    for index in range(count):
        try:
            found.append(read(module, index))
        except Exception as error:
            problems.append(f"{kind}:{index} failed: {_first_line(str(error)) or type(error).__name__}")
    return tuple(found)


def _cuda_facts(module: Any, index: int) -> DeviceFacts:
    properties = module.get_device_properties(index)
    hip = getattr(torch.version, "hip", None)
    capability = (int(properties.major), int(properties.minor))
    return DeviceFacts(
        kind="cuda",
        index=index,
        name=str(properties.name),
        compute_capability=None if hip else capability,
        architecture=str(getattr(properties, "gcnArchName", "")) or None if hip else None,
        memory_bytes=int(properties.total_memory),
        free_bytes=_ask(lambda: int(module.mem_get_info(index)[0]), None),
        cuda_version=torch.version.cuda,
        hip_version=hip,
        driver=host.nvidia_driver(),
        claims_bfloat16=_ask(lambda: _claims_bfloat16(module, index), None),
    )


def _claims_bfloat16(module: Any, index: int) -> bool:
    with module.device(index):
        return bool(module.is_bf16_supported())


_XPU_FLAGS = (
    "has_fp16",
    "has_fp64",
    "has_bfloat16_conversions",
    "has_subgroup_matrix_multiply_accumulate",
    "has_subgroup_matrix_multiply_accumulate_tensor_float32",
)


def _xpu_facts(module: Any, index: int) -> DeviceFacts:
    properties = module.get_device_properties(index)
    return DeviceFacts(
        kind="xpu",
        index=index,
        name=str(properties.name),
        memory_bytes=int(properties.total_memory),
        flags=tuple(flag for flag in _XPU_FLAGS if getattr(properties, flag, False)),
        driver=getattr(properties, "driver_version", None),
        claims_bfloat16=_ask(lambda: bool(module.is_bf16_supported()), None),
    )


def _mps(problems: list[str]) -> tuple[DeviceFacts, ...]:
    try:
        if not torch.backends.mps.is_available():
            return ()
    except Exception as error:
        problems.append(f"torch.backends.mps failed: {_first_line(str(error)) or type(error).__name__}")
        return ()
    limit: Callable[[], int] | None = getattr(torch.mps, "recommended_max_memory", None)
    return (
        DeviceFacts(
            kind="mps",
            name=host.cpu_name(),
            architecture=platform.machine() or None,
            memory_bytes=_ask(limit, None) if limit else None,
            os_version=host.os_version(),
        ),
    )


# what the names of instruction sets with vectors, matrices or narrow floats begin with, in torch's words and Linux's
_ARITHMETIC = ("sse", "avx", "amx", "f16c", "fma", "neon", "asimd", "fp16", "bf16", "i8mm", "dot", "fhm", "sve", "sme")


def _cpu() -> DeviceFacts:
    capabilities: dict[str, Any] = _ask(lambda: dict(getattr(torch.cpu, "get_capabilities", dict)()), {})
    # cpuinfo names the sizes and counts in the same mapping; only its yes-or-no entries are flags
    flags = {name for name, has in capabilities.items() if has is True} | set(host.cpu_flags())
    flags = {name for name in flags if name.startswith(_ARITHMETIC)}
    return DeviceFacts(
        kind="cpu",
        name=host.cpu_name(),
        architecture=platform.machine() or None,
        memory_bytes=host.memory_bytes(),
        free_bytes=host.free_memory_bytes(),
        flags=tuple(sorted(flags)),
        threads=torch.get_num_threads(),
        physical_cores=host.physical_cores() or capabilities.get("num_physical_cores"),
        usable_cores=host.usable_cores(),
        claims_bfloat16=_mkldnn_claims_bfloat16(),
    )


def _mkldnn_claims_bfloat16() -> bool | None:
    question = onednn_bfloat16_question()
    return _ask(lambda: bool(question()), None) if question is not None else None
