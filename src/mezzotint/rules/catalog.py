"""Every rule, in the order of its code."""

from typing import Any

from mezzotint.errors import ConfigError
from mezzotint.rules import setup
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace import (
    dtype_flow,
    missing,
    policy,
    ranges,
    refusals,
    regions,
    rounding,
    scaled_numbers,
    scaling,
    weights,
)
from mezzotint.rules.trace.view import TraceView

TRACE_RULES: tuple[Rule[TraceView], ...] = tuple(
    sorted(
        (
            rule
            for family in (
                dtype_flow,
                ranges,
                scaling,
                weights,
                regions,
                refusals,
                policy,
                missing,
                rounding,
                scaled_numbers,
            )
            for rule in family.RULES
        ),
        key=lambda rule: rule.code,
    )
)
ALL_RULES: tuple[Rule[Any], ...] = (*TRACE_RULES, *setup.RULES)


def find_rule(code: str) -> Rule[Any]:
    """Return a rule by its code or name. Raises ConfigError for an unknown one."""
    wanted = code.strip().lower()
    for rule in ALL_RULES:
        if wanted in (rule.code.lower(), rule.name):
            return rule
    known = f"{ALL_RULES[0].code} to {ALL_RULES[-1].code}"
    raise ConfigError(f"rule {code!r} is unknown; known are {known}, listed by: mezzotint rules")
