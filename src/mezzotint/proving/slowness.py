"""Why nothing became faster: short sentences about the machine and where a step's time goes.

They rest on the one step of each run that was profiled for its memory, and on what the machine does with the format.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mezzotint.errors import FormatError
from mezzotint.files import write_whole
from mezzotint.hardware.measure import measure_matmul
from mezzotint.hardware.probe import probe
from mezzotint.hardware.support import DeviceFacts, Support, format_support
from mezzotint.hardware.timings import spell_ratios
from mezzotint.lowprec.switch import status
from mezzotint.parity.design import Arm
from mezzotint.parity.result import ArmResult, Verdict
from mezzotint.policy.grammar import parse_policy
from mezzotint.proving.store import ProofFolder
from mezzotint.training.step_profile import StepProfile

SLOW_ABOVE = 0.8  # of the control's time
FEW_PRODUCTS, MANY_CASTS = 0.5, 0.1  # shares of a step
SHORT_OPERATION = 30e-6  # seconds; starting one from Python takes about a third of it


def write_profile(folder: Path, profile: StepProfile) -> None:
    """Keep the profile of a run's measured step; a disk that is full is found when the run itself is written."""
    with contextlib.suppress(OSError):
        write_whole(folder / "profile.json", json.dumps(profile.to_json()))


def why_no_speedup(folder: ProofFolder, results: Sequence[ArmResult]) -> Iterator[str]:
    """Yield a sentence for each reason that is found why a treatment is not clearly faster than the control."""
    experiment = folder.experiment
    control = parse_policy(experiment.control.policy)
    facts = probe(None)
    for arm, result in zip(experiment.treatments, results, strict=True):
        policy = parse_policy(arm.policy)
        ratio = next((cost.ratio.mean for cost in result.costs if cost.name == "step_time"), 0.0)
        has_other_products = policy.products is not None and policy.products != control.products
        is_lower = policy.compute != control.compute or has_other_products
        if ratio <= SLOW_ABOVE or not is_lower or result.verdict is Verdict.INVALID:
            continue
        words = [*_of_format(facts, policy.compute)] if policy.compute != control.compute else []
        if policy.products is not None and has_other_products:
            words += _of_products(facts, policy.products.inputs)
        profile = _profile(folder, arm)
        if profile is not None:
            words += _of_step(profile, facts)
        for word in words:
            yield f"{arm.name} takes {ratio:.2f} of {experiment.control.name}'s time: {word}"


def _profile(folder: ProofFolder, arm: Arm) -> StepProfile | None:
    for seed in folder.experiment.all_seeds():
        try:
            text = (folder.run_path(arm.name, seed) / "profile.json").read_text(encoding="utf-8")
            return StepProfile.from_json(json.loads(text))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return None


def _of_format(facts: DeviceFacts, name: str) -> Iterator[str]:
    """Say whether the device computes a format natively."""
    support = format_support(facts, name)
    if support.support in (Support.EMULATED, Support.ABSENT):
        yield f"{name} is {support.support} on {facts.name} ({support.reason})"
        return
    if facts.kind != "cpu" or name not in ("bfloat16", "float16"):
        return
    for choice in status():
        if choice.format == name and choice.ratios:
            yield f"a product in {name} takes {spell_ratios(dict(choice.ratios))} on {facts.name}"
            return
    timings = measure_matmul("cpu", (name,))
    if timings.ratios(name):
        yield f"a product in {name} takes {spell_ratios(timings.ratios(name))} on {facts.name}"


def _of_products(facts: DeviceFacts, name: str) -> Iterator[str]:
    """Say whether products whose inputs are rounded to a format are multiplied in it."""
    try:
        support = format_support(facts, name)
        if support.support is Support.NATIVE:
            return
        why = f"{name} is {support.support} on {facts.name}"
    except FormatError:
        why = f"no training kernel multiplies {name}"
    yield f"{why}, so that rounding to it only adds time"


def _of_step(profile: StepProfile, facts: DeviceFacts) -> Iterator[str]:
    """Say what a step's time is spent on, where that stands against a gain."""
    if not profile.num_operations or not profile.seconds:
        return
    products = profile.product_seconds / profile.seconds
    if products < FEW_PRODUCTS:
        yield f"products are {products:.0%} of a step, and only they become faster"
    casts = profile.cast_seconds / profile.seconds
    if casts > MANY_CASTS:
        yield f"casts and copies are {casts:.0%} of a step"
    each = profile.seconds / profile.num_operations
    if each < SHORT_OPERATION:
        yield (
            f"a step is {profile.num_operations:,} operations of {each * 1e6:.0f} µs on average, little more than "
            "starting each takes; a larger batch or model would gain more"
        )
    if facts.kind == "cuda" and profile.off_tile:
        sizes = ", ".join(str(size) for size in profile.off_tile[:4])
        yield f"products have dimensions off the tensor cores' tile of 8: {sizes}"
