"""What is wrong, or not as it seems, with a machine's set-up for training: the MZ3xx findings. Judges, prints nothing.

MZ301  torch says bfloat16 is supported, and it is emulated
MZ302  stock autocast on this CPU is slower than float32
MZ303  more threads than processors that may be used
MZ304  far fewer threads than cores
MZ305  TF32 is off on a device that has it
MZ306  float32 products run in less than float32
MZ307  a device is there and torch cannot use it
MZ308  this build of torch has no kernels for the device
MZ309  most of a device's memory is taken
MZ310  the machine was too busy to measure
MZ311  weights, gradients and states do not fit the device's memory (`mezzotint.policy.memory`)
"""

from collections.abc import Iterator, Sequence

from mezzotint.findings import Finding, Severity
from mezzotint.hardware.setup import TorchSetup, spell_matmul_precision
from mezzotint.hardware.support import DeviceFacts, Support, format_support
from mezzotint.hardware.timings import MatmulTimings, Speed, matmul_speed, spell_ratio, spell_ratios

Measured = Sequence[tuple[DeviceFacts, MatmulTimings | None]]

TAKEN_ABOVE = 0.5  # share of an accelerator's memory that others hold


def check_setup(devices: Measured, setup: TorchSetup) -> tuple[Finding, ...]:
    """Return the findings about devices with their timings (None where not measured) and torch's settings.

    The first device is the one to train on.
    """
    findings = list(_problems(setup))
    for facts, timings in devices:
        findings += (
            *_bfloat16(facts, timings),
            *_too_new_or_old(facts, setup),
            *_memory(facts),
            *_busy(facts, timings),
        )
        if facts.kind == "cpu":
            is_trained_on = facts is devices[0][0]
            findings += (*_stock_autocast(facts, timings, is_trained_on), *_threads(facts, setup, is_trained_on))
    findings += _matmul_precision([facts for facts, _ in devices], setup)
    return tuple(findings)


def _problems(setup: TorchSetup) -> Iterator[Finding]:
    for problem in setup.problems:
        yield Finding(
            code="MZ307",
            severity=Severity.WARNING,
            message=f"a device could not be used: {problem}",
            evidence={"problem": problem},
            advice="check the driver (nvidia-smi, rocm-smi) and that it is new enough for this build of torch",
        )
    if setup.has_nvidia_device and setup.cuda_version is None and setup.hip_version is None:
        yield Finding(
            code="MZ307",
            severity=Severity.WARNING,
            message=f"the machine has an NVIDIA card, and this build of torch ({setup.torch_version}) has no CUDA",
            evidence={"nvidia_driver": setup.nvidia_driver, "torch_version": setup.torch_version},
            advice="install a CUDA build of torch, see pytorch.org/get-started",
        )


def _bfloat16(facts: DeviceFacts, timings: MatmulTimings | None) -> Iterator[Finding]:
    support = format_support(facts, "bfloat16", timings)
    is_fiction = support.support in (Support.EMULATED, Support.ABSENT)
    if facts.kind == "cpu" or not facts.claims_bfloat16 or not is_fiction:
        return
    ratio = support.measured_ratio
    pace = "" if ratio is None else f"; a product takes {spell_ratio(ratio)} times as long as in float32"
    yield Finding(
        code="MZ301",
        severity=Severity.WARNING,
        message=f"torch says that {facts.device} ({facts.name}) supports bfloat16, and it is emulated{pace}",
        evidence={"device": facts.device, "reason": support.reason, "measured_ratio": ratio},
        advice="train with policy fp16-mixed; is_bf16_supported(including_emulation=False) tells the truth",
    )


def _stock_autocast(facts: DeviceFacts, timings: MatmulTimings | None, is_trained_on: bool) -> Iterator[Finding]:
    if timings is None or timings.is_disturbed:
        return
    for name in ("bfloat16", "float16"):
        if matmul_speed(timings, name) is not Speed.SLOWER:
            continue
        ratios = timings.ratios(name)
        # bfloat16 is what torch.autocast("cpu") uses unless told otherwise
        is_default = name == "bfloat16" and is_trained_on
        yield Finding(
            code="MZ302",
            severity=Severity.WARNING if is_default else Severity.INFO,
            message=(
                f'torch.autocast("cpu", dtype=torch.{name}) would slow training down: matmul takes '
                f"{spell_ratios(ratios)}"
            ),
            evidence={"format": name, "ratios": ratios, "torch_claims_bfloat16": facts.claims_bfloat16},
            advice="train in float32, or let mezzotint's own CPU kernels run the policy at about float32's speed",
        )


def _threads(facts: DeviceFacts, setup: TorchSetup, is_trained_on: bool) -> Iterator[Finding]:
    usable = setup.usable_cores
    if usable is None:
        return
    variables = {name: value for name, value in setup.environment if "THREADS" in name}
    evidence = {
        "threads": setup.threads,
        "usable_cores": usable,
        "physical_cores": setup.physical_cores,
        "environment": variables,
    }
    severity = Severity.WARNING if is_trained_on else Severity.INFO
    named = f" ({', '.join(f'{name}={value}' for name, value in variables.items())})" if variables else ""
    best = max(1, int(min(usable, setup.physical_cores or usable)))
    if setup.threads > usable:
        yield Finding(
            code="MZ303",
            severity=severity,
            message=(
                f"torch computes with {setup.threads} threads on {usable:g} processors{named}, so they take turns"
            ),
            evidence=evidence,
            advice=f"set OMP_NUM_THREADS={best}",
        )
    elif 2 * setup.threads < best:
        threads = "1 thread" if setup.threads == 1 else f"{setup.threads} threads"
        yield Finding(
            code="MZ304",
            severity=severity,
            message=f"torch computes with {threads} on {best} usable cores{named}",
            evidence=evidence,
            advice=f"set OMP_NUM_THREADS={best}, or unset it",
        )


def _matmul_precision(devices: Sequence[DeviceFacts], setup: TorchSetup) -> list[Finding]:
    has_tf32 = [f for f in devices if format_support(f, "tfloat32").support is Support.NATIVE]
    evidence = {"float32_matmul_precision": setup.matmul_precision, "devices": [f.device for f in has_tf32]}
    if setup.matmul_precision == "highest" and has_tf32:
        names = ", ".join(f.device for f in has_tf32)
        return [
            Finding(
                code="MZ305",
                severity=Severity.INFO,
                message=f"TF32 is off on {names}, which has it: {spell_matmul_precision('highest')}, at a lower speed",
                evidence=evidence,
                advice='torch.set_float32_matmul_precision("high") turns it on, where 11 bits per factor are enough',
            )
        ]
    if setup.matmul_precision in ("high", "medium") and (has_tf32 or setup.matmul_precision == "medium"):
        return [
            Finding(
                code="MZ306",
                severity=Severity.INFO,
                message=(
                    f"float32 matmul precision is {setup.matmul_precision!r}: "
                    f"{spell_matmul_precision(setup.matmul_precision)}"
                ),
                evidence=evidence,
                advice='a float32 control run needs torch.set_float32_matmul_precision("highest")',
            )
        ]
    return []


def _too_new_or_old(facts: DeviceFacts, setup: TorchSetup) -> Iterator[Finding]:
    capability = facts.compute_capability
    built = sorted(int(a[3:]) for a in setup.cuda_archs if a.startswith("sm_") and a[3:].isdigit())
    if facts.kind != "cuda" or capability is None or not built:
        return
    # kernels run on devices of the same major version and the same or a later minor one; PTX ("compute_") on all later
    ours = capability[0] * 10 + capability[1]
    has_kernels = any(arch // 10 == capability[0] and arch <= ours for arch in built)
    has_ptx = any(a.startswith("compute_") and a[8:].isdigit() and int(a[8:]) <= ours for a in setup.cuda_archs)
    if has_kernels or has_ptx:
        return
    yield Finding(
        code="MZ308",
        severity=Severity.ERROR,
        message=(
            f"this build of torch ({setup.torch_version}) has no kernels for {facts.device} ({facts.name}), "
            f"compute capability {capability[0]}.{capability[1]}; it was built for {', '.join(setup.cuda_archs)}"
        ),
        evidence={"device": facts.device, "compute_capability": capability, "built_for": setup.cuda_archs},
        advice="install a build of torch for an " + ("older" if ours < built[0] else "newer") + " version of CUDA",
    )


def _memory(facts: DeviceFacts) -> Iterator[Finding]:
    if facts.kind != "cuda" or not facts.memory_bytes or facts.free_bytes is None:
        return
    taken = 1 - facts.free_bytes / facts.memory_bytes
    if taken > TAKEN_ABOVE:
        yield Finding(
            code="MZ309",
            severity=Severity.WARNING,
            message=(
                f"{taken:.0%} of the memory of {facts.device} is taken; "
                f"{facts.free_bytes / 2**30:.1f} of {facts.memory_bytes / 2**30:.1f} GiB are free"
            ),
            evidence={"device": facts.device, "free_bytes": facts.free_bytes, "memory_bytes": facts.memory_bytes},
            advice="see who holds it with nvidia-smi or rocm-smi",
        )


def _busy(facts: DeviceFacts, timings: MatmulTimings | None) -> Iterator[Finding]:
    if timings is not None and timings.is_disturbed:
        yield Finding(
            code="MZ310",
            severity=Severity.INFO,
            message=f"other programs kept {facts.device} busy, so its measured figures mean little",
            evidence={"device": facts.device},
            advice="run the command again when the machine is quiet",
        )
