"""Which policy suits a device, with the reasons; and whether a device can run a policy that was asked for by name.

A choice is made for who asks for none: bfloat16 where it is native and measured faster, float16 with dynamic scaling
where only that is native, float32 else. A wish is granted or refused, never changed.
"""

from typing import Any

from mezzotint.errors import ConfigError, PolicyError, echoed
from mezzotint.formats.catalog import find_format
from mezzotint.hardware.devices import find_device
from mezzotint.hardware.support import DeviceFacts, Support, format_support
from mezzotint.hardware.timings import FASTER_BELOW, MatmulTimings, Speed, matmul_speed, spell_ratios
from mezzotint.policy.decision import Decision
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.policy import FORMAT_AXES, Policy

_STORAGE_AXES = tuple(axis for axis in FORMAT_AXES if axis != "compute")


def choose(
    facts: DeviceFacts | Any | None = None,
    measured: MatmulTimings | None = None,
    *,
    device: Any = None,
) -> Decision[Policy]:
    """Return the policy for a device with the reasons, the decisive one first.

    `device`, or the first argument, is a torch.device or its name, such as "cuda:1". Without facts the device (the one
    to train on, unless given) is probed. A device that is here is measured unless the measurement is given, which takes
    about 0.1 s. Of facts about one that is not here, as for a GPU that is planned for, a GPU's are taken at their word
    and a CPU's are not: what its flags promise, its library may not have.

    Raises ConfigError for a device that is not here, and for anything else than facts or a device.
    """
    if facts is not None and not isinstance(facts, DeviceFacts):
        if device is not None:
            raise ConfigError(f"choose() got the devices {echoed(facts)} and {echoed(device)}; pass one of them")
        facts, device = None, facts
    if measured is not None and not isinstance(measured, MatmulTimings):
        raise ConfigError(
            f"measured must be what mezzotint.hardware.measure.measure_matmul returned, got {echoed(measured)}; leave "
            "it out to measure"
        )
    if facts is None:
        # torch is loaded only when a device is asked; whoever brings facts does without it
        from mezzotint.hardware.probe import probe

        facts = probe(device)
    if measured is None and facts.is_here:
        measured = _measure(facts)
    return _decide(facts, measured)


def _measure(facts: DeviceFacts) -> MatmulTimings:
    """Time what the choice depends on; float16 only where bfloat16 does not settle it."""
    from mezzotint.hardware.measure import measure_matmul

    timings = measure_matmul(facts.device, ("bfloat16",))
    if _is_worthwhile(facts, "bfloat16", timings) or not _may_be_native(facts, "float16", None):
        return timings
    return measure_matmul(facts.device, ("bfloat16", "float16"))


def _decide(facts: DeviceFacts, timings: MatmulTimings | None) -> Decision[Policy]:
    ours = f"{facts.name} ({facts.device})"
    if timings is not None and timings.is_disturbed:
        return _decide_by_flags(facts, timings)
    if _is_worthwhile(facts, "bfloat16", timings):
        reasons = (_why_worthwhile(facts, "bfloat16", timings), *_published(facts, "bfloat16"))
        return Decision(parse_policy("bf16-mixed"), (*reasons, *_caveat(timings)))
    against = _why_not(facts, "bfloat16", timings)
    is_bfloat16_native = format_support(facts, "bfloat16", timings).support is Support.NATIVE
    if not is_bfloat16_native and _is_worthwhile(facts, "float16", timings):
        scaling = "Gradients below 6e-8 vanish in float16, so the loss is scaled, and the scale adapts itself."
        reasons = (_why_worthwhile(facts, "float16", timings), against, scaling, *_published(facts, "float16"))
        return Decision(parse_policy("fp16-mixed"), (*reasons, *_caveat(timings)))
    also = () if is_bfloat16_native else (_why_not(facts, "float16", timings),)
    first = f"Neither bfloat16 nor float16 is native and faster than float32 on {ours}."
    if is_bfloat16_native:
        first = f"bfloat16 brings no speed on {ours}."
    hint = (
        (
            "bf16-mixed can be asked for by name, to save activation memory or to rehearse a GPU run: the package's "
            "own CPU kernels then run it at about float32's speed."
        )
        if facts.kind == "cpu"
        else "bf16-mixed and fp16-mixed can be asked for by name, to save memory."
    )
    return Decision(parse_policy("float32"), (first, against, *also, *_caveat(timings), hint))


def _decide_by_flags(facts: DeviceFacts, timings: MatmulTimings) -> Decision[Policy]:
    """Return what a device's flags promise, for a measurement that cannot be used."""
    for name, policy in (("bfloat16", "bf16-mixed"), ("float16", "fp16-mixed")):
        support = format_support(facts, name)
        is_chosen = support.support is Support.NATIVE and (name == "bfloat16" or facts.kind != "cpu")
        if is_chosen:
            why = f"The flags of {facts.name} say that {name} is native ({support.reason}); its speed is not known."
            return Decision(parse_policy(policy), (why, *_published(facts, name), *_caveat(timings)))
    why = f"The flags of {facts.name} promise no native bfloat16; its speed is not known."
    return Decision(parse_policy("float32"), (why, *_caveat(timings)))


def _may_be_native(facts: DeviceFacts, name: str, timings: MatmulTimings | None) -> bool:
    return format_support(facts, name, timings).support in (Support.NATIVE, Support.UNKNOWN)


def _is_worthwhile(facts: DeviceFacts, name: str, timings: MatmulTimings | None) -> bool:
    """Return whether a format is native and its matmul faster than float32's."""
    if not _may_be_native(facts, name, timings):
        return False
    speed = None if timings is None else matmul_speed(timings, name)
    if speed is None:  # not measured
        return facts.kind != "cpu" and format_support(facts, name).support is Support.NATIVE
    return speed is Speed.FASTER


def _why_worthwhile(facts: DeviceFacts, name: str, timings: MatmulTimings | None) -> str:
    support = format_support(facts, name)  # without timings: the rule's own words
    native = f"{name} is native on {facts.name} ({support.reason})"
    ratios = timings.ratios(name) if timings is not None else {}
    if not ratios:
        return f"{native}; its speed was not measured."
    if support.support is not Support.NATIVE:
        native = f"{name} behaves as native on {facts.name}"
    return f"{native}, and matmul takes {spell_ratios(ratios)}."


def _why_not(facts: DeviceFacts, name: str, timings: MatmulTimings | None) -> str:
    support = format_support(facts, name)
    ratios = timings.ratios(name) if timings is not None else {}
    figures = f"matmul takes {spell_ratios(ratios)}" if ratios else "its speed was not measured"
    if support.support in (Support.EMULATED, Support.ABSENT):
        measured = f"; {figures}" if ratios else ""
        return f"{name} is {support.support} on {facts.name}: {support.reason}{measured}."
    limit = f", and {FASTER_BELOW:g} or less in every layout counts as faster" if ratios else ""
    doubt = ", and a CPU's flags alone mislead" if not ratios and facts.kind == "cpu" else ""
    has = f"{facts.name} has" if support.support is Support.NATIVE else f"Nobody knows whether {facts.name} has"
    return f"{has} {name} units ({support.reason}), but {figures}{limit}{doubt}."


def _published(facts: DeviceFacts, name: str) -> tuple[str, ...]:
    spec = find_device(facts.name)
    if spec is None:
        return ()
    half, full = spec.peak_flops_per_second(name), spec.peak_flops_per_second("float32")
    if half is None or full is None:
        return ()
    return (
        f"The published dense peak of {spec.name} is {half / 1e12:g} TFLOP/s in {name}, {full / 1e12:g} in float32.",
    )


def _caveat(timings: MatmulTimings | None) -> tuple[str, ...]:
    if timings is None or not timings.is_disturbed:
        return ()
    return (
        "Other programs kept the machine busy while this was measured: the figures decide nothing; ask again when it "
        "is quiet.",
    )


def check_policy(policy: Policy, facts: DeviceFacts) -> None:
    """Return nothing if the engine can run the policy on the device.

    What is emulated is granted: it is slower or saves memory only, and it was asked for. Raises PolicyError with the
    field, what stands against it, and what to pass instead.
    """
    for axis in FORMAT_AXES:
        name: str = getattr(policy, axis)
        if axis in _STORAGE_AXES and name == "tfloat32":
            raise PolicyError(
                f"{axis}=tfloat32 is refused: tfloat32 is how tensor cores read float32 in a product, nothing is "
                f"stored in it; pass {axis}=float32"
            )
        if find_format(name).bits <= 8:
            raise PolicyError(
                f"{axis}={name} is refused: the engine runs {axis} in no format below 16 bits; pass {axis}=bfloat16"
            )
        support = format_support(facts, name)
        if support.support is Support.ABSENT:
            raise PolicyError(
                f"{axis}={name} is refused on {facts.device} ({facts.name}), which lacks it: {support.reason}; "
                f"pass {axis}={_instead(facts, name)} or another device"
            )


def _instead(facts: DeviceFacts, name: str) -> str:
    """Return the nearest format that the device has."""
    wished = {"bfloat16": ("float16",), "float16": ("bfloat16",)}.get(name, ())
    has = (other for other in wished if format_support(facts, other).support is Support.NATIVE)
    return next(has, "float32")
