"""`assert_policy`: a team's dtypes as a test.

def test_dtypes():
    model, optimizer, batch = build()
    mz.assert_policy(lambda: training_step(model, optimizer, batch), "bf16-mixed")
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mezzotint.auditing.session import audit
from mezzotint.errors import AuditError, ConfigError, echoed, is_count
from mezzotint.findings import Finding, Severity
from mezzotint.policy.policy import Policy
from mezzotint.rules.catalog import TRACE_RULES
from mezzotint.torch_internals.registry import Feature, MissingInternalWarning, notes


def assert_policy(
    step: Callable[[], Any],
    policy: Policy | str,
    *,
    steps: int = 1,
    ignore: Sequence[str] = (),
    has_ranges: bool = True,
) -> None:
    """Run a training step `steps` times under the audit and fail where it departs from `policy`.

    `ignore` lists codes of rules ("MZ252") that are accepted. Raises AssertionError that names each departure and each
    other fault found, with module and line; also where no step was seen, as a test of nothing proves nothing. Raises
    AuditError where `step` is no function or `steps` no number of 1 or more. In a script that `mezzotint audit` runs,
    the steps run, that audit judges them, and nothing is raised here.
    """
    ignored = _known_codes(ignore)
    if not callable(step):
        raise AuditError(f"assert_policy runs a function, got {echoed(step)}; pass lambda: training_step(...)")
    if not is_count(steps):
        raise AuditError(f"steps={echoed(steps)} is not a number of steps; pass 1 or more")
    with audit(policy=policy, has_ranges=has_ranges) as seen:
        for _ in range(steps):
            step()
    if seen.is_skipped:
        return
    if not seen.num_steps:
        raise AssertionError("no training step was seen: the function must run backward and step an optimizer")
    found = [one for one in seen.findings if one.severity is not Severity.INFO and one.code not in ignored]
    missing = notes(Feature.RECORDING)
    if found:
        listed = "\n".join([*(f"  {line_of(one)}" for one in found), *(f"  note: {one}" for one in missing)])
        raise AssertionError(f"the step departs from the policy {seen.policy}:\n{listed}")
    for one in missing:
        warnings.warn(f"assert_policy passed, but not all was judged: {one}", MissingInternalWarning, stacklevel=2)


def _known_codes(codes: Sequence[str]) -> set[str]:
    """Return the codes in capitals. Raises ConfigError for what is no code of a rule."""
    if isinstance(codes, (str, bytes)) or not isinstance(codes, Iterable):
        raise ConfigError(f'ignore must be a list of codes such as ["MZ252"], got {codes!r:.200}')
    known = {rule.code for rule in TRACE_RULES}
    listed = list(codes)
    for code in listed:
        if not isinstance(code, str) or code.upper() not in known:
            raise ConfigError(
                f"ignore names {code!r:.200}, which is no code of a rule; list them with: mezzotint rules"
            )
    return {code.upper() for code in listed}


def line_of(finding: Finding) -> str:
    """Return a finding as one line: place, code, message."""
    place = f"{finding.path}:{finding.line} " if finding.path else ""
    module = f" [{finding.module}]" if finding.module else ""
    return f"{place}{finding.code} {finding.message}{module}"
