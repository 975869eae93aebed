"""Claims on what training reaches: from proofs, paired runs with an equivalence test."""

from collections.abc import Mapping
from typing import Any

from mezzotint.claims.claim import Answer, Claim, Figures, Verdict


def _said(arm: Mapping[str, Any]) -> str:
    """Return what a proof says of an arm."""
    return (
        f"{arm['name']} {arm['verdict']}, {arm['metric']} {arm['mean']:+.2%} ({arm['level']:.3g} interval "
        f"{arm['low']:+.2%} to "
        f"{arm['high']:+.2%}, {arm['pairs']} pairs)"
    )


def _judge_no_loss(found: Figures) -> Answer:
    arm = found["mixed"]
    is_equivalent = arm["verdict"] in ("equivalent", "identical")
    return Answer(
        verdict=Verdict.CONDITIONAL if is_equivalent else Verdict.FALSE,
        condition=f"{arm['margin']:.2g} of the loss counts as none" if is_equivalent else "",
        figure=f"{found['model']}: {_said(arm)}",
    )


QUALITY: tuple[Claim, ...] = ()
