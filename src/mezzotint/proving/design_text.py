"""Arms and metrics as users spell them on the command line and in `mz.prove`.

NAME | NAME=POLICY | NAME=POLICY,key=value,...
NAME[:MARGIN[%|abs]][:higher|lower|neither]
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace

from mezzotint.errors import ProofError
from mezzotint.parity.design import (
    CURVE,
    DISTANCE,
    FINAL_LOSS,
    GRADIENT_ERROR,
    LOG_PROB_ERROR,
    VALIDATION_LOSS,
    Arm,
    Better,
    Metric,
    Source,
)
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.policy import POLICY_FIELDS

DEFAULT_ARMS = ("float32", "bf16-mixed")
DEFAULT_MARGIN = 0.005
_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^(]*\))")
_MARGIN = re.compile(r"([0-9.eE+-]+)(%|abs)?")


def parse_arm(text: str) -> Arm:
    """Return the arm that `text` spells.

    >>> parse_arm("fp16=fp16-mixed,scaling=static(1024),train.compile=true")
    Arm(name='fp16', policy='fp16-mixed,scaling=static(1024)', settings=('train.compile=true',))

    Parts whose key is a field of policies belong to the policy, all others are settings. Raises ProofError without a
    policy, PolicyError for one that is unknown.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    if not equals:
        if name != "auto":
            parse_policy(name)
        return Arm(name=name, policy=name)
    policy: list[str] = []
    settings: list[str] = []
    for position, part in enumerate(part.strip() for part in _COMMA_OUTSIDE_PARENTHESES.split(rest)):
        key, has_value, value = (piece.strip() for piece in part.partition("="))
        is_preset = position == 0 and not has_value
        if is_preset or key in POLICY_FIELDS:
            policy.append(part)
        elif has_value and key and value:
            settings.append(f"{key}={value}")
        else:
            raise ProofError(f"--arm {text}: {part!r} is neither a policy nor key=value; write NAME=POLICY,key=value")
    if not policy:
        raise ProofError(f"--arm {text} names no policy; write {name}=float32,{rest}")
    if policy != ["auto"]:
        parse_policy(",".join(policy))
    return Arm(name=name, policy=",".join(policy), settings=tuple(settings))


def parse_metric(text: str, margin: float = DEFAULT_MARGIN) -> Metric:
    """Return the metric that `text` spells, a primary one: `accuracy:1%:higher`, `perplexity`, `auc:0.002abs:higher`.

    A margin is a share of the control's value, or with `abs` a number in the metric's own unit. Raises ProofError.
    """
    name, *parts = text.split(":")
    if not name or len(parts) > 2:
        raise ProofError(f"--metric {text} is refused; write NAME, NAME:MARGIN or NAME:MARGIN:higher")
    known = {metric.name: metric.better for metric in (VALIDATION_LOSS, FINAL_LOSS, CURVE, DISTANCE)}
    better, is_relative = known.get(name, Better.LOWER), True
    for part in parts:
        if part in set(Better):
            better = Better(part)
            continue
        match = _MARGIN.fullmatch(part)
        margin = _number(match[1]) if match else math.nan
        if not (0 < margin < math.inf):
            raise ProofError(
                f"--metric {text}: {part!r} is neither a margin (0.005, 0.5%, 0.01abs) nor higher, lower, neither"
            )
        if match is not None and match[2] == "%":
            margin /= 100
        is_relative = match is None or match[2] != "abs"
    return Metric(name=name, margin=margin, is_relative=is_relative, better=better)


def choose_metrics(source: Source, wanted: Iterable[Metric], margin: float | None) -> tuple[Metric, ...]:
    """Return the metrics of an experiment: those asked for decide, else those that its runs record by themselves."""
    wanted = tuple(wanted)
    names = {metric.name for metric in wanted}
    own: tuple[Metric, ...] = (FINAL_LOSS, CURVE)
    if source is Source.RECIPE:
        # a recipe's loss is measured on held-out text; the last training losses say the same with more noise
        own = (VALIDATION_LOSS, CURVE, replace(FINAL_LOSS, is_primary=False), DISTANCE, GRADIENT_ERROR, LOG_PROB_ERROR)
    losses = {VALIDATION_LOSS.name, FINAL_LOSS.name, CURVE.name}
    shown = [
        replace(
            metric,
            margin=margin if margin is not None and metric.name in losses else metric.margin,
            is_primary=metric.is_primary and not wanted,
        )
        for metric in own
        if metric.name not in names
    ]
    return (*wanted, *shown)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
