"""What a policy keeps in memory for each parameter, before any activation, and whether a device holds it.

Mixed precision halves activations, not this: float32 weights, gradients and AdamW's two states are 16 bytes whatever
the operations compute in, and autocast adds a 16-bit copy of every weight that forward has cast.
"""

import re
from collections.abc import Mapping

from mezzotint.errors import ConfigError
from mezzotint.findings import Finding, Severity
from mezzotint.formats.catalog import find_format
from mezzotint.hardware.support import DeviceFacts
from mezzotint.policy.policy import Policy, Update

ADAM_STATES = 2
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def bytes_per_parameter(policy: Policy) -> Mapping[str, float]:
    """Return bytes for each parameter by what they hold, under AdamW; what exists in part of a step counts as well."""
    weight = find_format(policy.params).bytes
    extra = {Update.MASTER: 4.0, Update.STOCHASTIC: 4.0, Update.KAHAN: weight + 4.0, Update.PLAIN: 0.0}[policy.update]
    is_cast = policy.params != policy.compute and find_format(policy.compute).bits < 32
    return {
        "weights": weight,
        "gradients": find_format(policy.reduce).bytes,
        "optimizer states": ADAM_STATES * find_format(policy.state).bytes,
        "float32 copies": extra,
        "autocast's copies": find_format(policy.compute).bytes if is_cast else 0.0,
    }


def check_memory(policy: Policy, parameters: float, facts: DeviceFacts) -> tuple[Finding, ...]:
    """Return MZ311 where a model of so many parameters does not fit a device under a policy; empty where unknown."""
    if facts.memory_bytes is None:
        return ()
    parts = {name: size for name, size in bytes_per_parameter(policy).items() if size}
    need = parameters * sum(parts.values())
    spelt = ", ".join(f"{name} {size:g}" for name, size in parts.items())
    evidence = {"need_bytes": round(need), "memory_bytes": facts.memory_bytes, "free_bytes": facts.free_bytes}
    if need > facts.memory_bytes:
        severity, limit, has = Severity.ERROR, facts.memory_bytes, "has"
    elif facts.free_bytes is not None and need > facts.free_bytes:
        severity, limit, has = Severity.WARNING, facts.free_bytes, "has free"
    else:
        return ()
    message = (
        f"{parameters:,.0f} parameters need {need / 2**30:.1f} GiB under this policy before any activation "
        f"({sum(parts.values()):g} bytes each: {spelt}), and {facts.device} {has} {limit / 2**30:.1f} GiB"
    )
    return (
        Finding(
            code="MZ311",
            severity=severity,
            message=message,
            evidence=evidence,
            advice="shard weights and states over several devices (FSDP2), train fewer parameters, or free memory",
        ),
    )


def parse_count(text: str) -> float:
    """Return the number that "124M", "1.3b" or "7e9" spells. Raises ConfigError for any other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([kmbt]?)", text.strip().lower())
    if not found or not 1 <= float(found[1]) * _UNITS[found[2]] <= 1e15:
        raise ConfigError(f"{text!r} is no number of parameters; write 124M, 1.3B or 7e9")
    return float(found[1]) * _UNITS[found[2]]
