"""Differences as words, alike in the verdicts' reasons and in reports.

Pure: no torch.
"""

import math

_MOST_DECIMALS = 9
_TIMES = 10.0  # from this share of the control's value on, percent is no help


def spell_difference(value: float, margin: float, *, is_relative: bool) -> str:
    """Return a difference with its sign, to a tenth of the margin's first digit; a share as percent of the control.

    >>> spell_difference(0.00044, 0.005, is_relative=True)
    '+0.04%'
    """
    if not math.isfinite(value):
        return str(value)
    if is_relative and abs(value) >= _TIMES:
        return f"{value:+.3g} times the control"
    scale, sign = (100.0, "%") if is_relative else (1.0, "")
    decimals = min(_MOST_DECIMALS, max(0, 1 - math.floor(math.log10(margin * scale))))
    spelled = f"{value * scale:+,.{decimals}f}"
    return (spelled if float(spelled.replace(",", "")) else spelled.lstrip("+-")) + sign


def spell_margin(margin: float, *, is_relative: bool) -> str:
    """Return a margin: percent of the control's value where it is a share."""
    return f"{margin * 100:.4g}%" if is_relative else f"{margin:.4g}"
