"""A proof's figures and verdicts as words: what terminal, page and pull request have in common.

An equivalence names its margin and its interval, and "undecided" says what is missing: no sentence here says more than
the figures do.
"""

import math
from collections.abc import Mapping

from mezzotint.parity.design import Experiment, Metric, Source
from mezzotint.parity.result import ArmResult, Cost, Interval, MetricResult, Proof, Run, RunStatus, Verdict

STYLES = {
    Verdict.IDENTICAL: "good",
    Verdict.EQUIVALENT: "good",
    Verdict.BETTER: "good",
    Verdict.WORSE: "bad",
    Verdict.UNDECIDED: "unsure",
    Verdict.INVALID: "bad",
}
_PHRASES = {
    Verdict.IDENTICAL: "{arm} is identical to {control}",
    Verdict.EQUIVALENT: "{arm} is equivalent to {control}",
    Verdict.BETTER: "{arm} is better than {control}",
    Verdict.WORSE: "{arm} is worse than {control}",
    Verdict.UNDECIDED: "{arm} against {control} is undecided",
    Verdict.INVALID: "{arm} was not tested against {control}",
}
# The classes of `Run.memory_bytes` in the order in which they are shown, and what a reader calls them.
MEMORY_CLASSES = {
    "weights": "weights",
    "masters": "float32 masters",
    "states": "optimizer states",
    "gradients": "gradients",
    "activations": "activations",
    "cast_cache": "casts of weights",
    "temporaries": "temporaries",
}
PEAK = "peak"
_MOST_NAMES = 3  # in a headline


def name_words(name: str) -> str:
    """Return a metric's or a cost's name as a reader's words."""
    return name.replace("_", " ")


def phrase(result: ArmResult, control: str) -> str:
    """Return the verdict in a few words, such as `bf16-mixed is equivalent to float32`."""
    return _PHRASES[result.verdict].format(arm=result.arm, control=control)


def headline(proof: Proof) -> str:
    """Return the verdict on all treatments in a few words."""
    control = proof.experiment.control.name
    if len(proof.results) == 1:
        return phrase(proof.results[0], control)
    groups: dict[Verdict, list[str]] = {}
    for result in proof.results:
        groups.setdefault(result.verdict, []).append(result.arm)
    words = {Verdict.INVALID: "not tested"}
    parts = [
        f"{listed(arms) if len(proof.results) <= _MOST_NAMES else len(arms)} {words.get(verdict, str(verdict))}"
        for verdict, arms in sorted(groups.items(), key=lambda item: list(_PHRASES).index(item[0]))
    ]
    return f"Against {control}: {'; '.join(parts)}"


def listed(names: list[str]) -> str:
    """Return names as a list in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(proof: Proof, result: ArmResult) -> str:
    """Return the verdict on one treatment in one sentence, with the figure that carries it."""
    said, why = phrase(result, proof.experiment.control.name), grounds(result)
    return f"{said}: {why}." if why else f"{said}."


def grounds(result: ArmResult) -> str:
    """Return why the verdict is what it is: the figure that carries it, else the first reason; no full stop."""
    metric = decisive(result)
    has_figure = metric is not None and metric.interval is not None and metric.verdict is result.verdict
    if result.verdict is Verdict.IDENTICAL:
        return f"the same bits in every loss and weight{f' of {_pairs(metric)}' if metric is not None else ''}"
    if metric is None or not has_figure:
        # something else than a figure decided: a run that diverged or did not learn
        return _without_stop(result.reasons[0]) if result.reasons else ""
    figure = f"{name_words(metric.name)} differs by {spell_difference(metric)}"
    margin = spell_margin(metric)
    match result.verdict:
        case Verdict.EQUIVALENT:
            others = sum(one.is_primary for one in result.metrics) - 1
            more = {0: "", 1: "; the other primary metric stays within its own too"}.get(
                others, f"; the {others} other primary metrics stay within theirs too"
            )
            return f"{figure} over {_pairs(metric)}, within the margin of {margin}{more}"
        case Verdict.UNDECIDED:
            needed = result.seeds_needed or metric.seeds_needed
            following = f"about {needed} pairs would decide" if needed else "how many pairs would decide cannot be said"
            return (
                f"{figure} over {_pairs(metric)}: neither shown to be within the margin of {margin} nor shown to be a "
                f"difference; {following}"
            )
        case _:
            return f"{figure} over {_pairs(metric)}, {_beyond(metric)} the margin of {margin}"


def _pairs(metric: MetricResult) -> str:
    return f"{metric.num_pairs} pair{'s' * (metric.num_pairs != 1)}"


def _beyond(metric: MetricResult) -> str:
    """Say where the interval from which differences are read lies."""
    shown = shown_interval(metric)
    is_beyond = shown is not None and (shown.low >= metric.margin or shown.high <= -metric.margin)
    return "beyond" if is_beyond else "more than chance, though not shown to be beyond"


def _without_stop(text: str) -> str:
    return text.strip().rstrip(".")


def decisive(result: ArmResult) -> MetricResult | None:
    """Return the primary metric that the verdict hangs on: the first of its verdict, of equivalent ones the closest call."""
    primary = [one for one in result.metrics if one.is_primary]
    alike = [one for one in primary if one.verdict is result.verdict]
    if result.verdict is Verdict.EQUIVALENT and alike:
        return max(alike, key=lambda one: _reach(one) / one.margin)
    return next(iter(alike or primary), None)


def _reach(metric: MetricResult) -> float:
    return 0.0 if metric.interval is None else max(abs(metric.interval.low), abs(metric.interval.high))


def shown_interval(metric: MetricResult) -> Interval | None:
    """Return the interval that the metric's verdict was read from."""
    return metric.wide if metric.verdict in (Verdict.BETTER, Verdict.WORSE) else metric.interval


def spell_difference(metric: MetricResult) -> str:
    """Return the mean difference with the interval that its verdict was read from."""
    shown = shown_interval(metric)
    if shown is None:
        return "-"
    digits = _digits(metric)
    low, mean, high = (_signed(value, digits, is_relative=metric.is_relative) for value in (shown.low, shown.mean, shown.high))
    return f"{mean} ({spell_level(shown.level)} interval {low} to {high})"


def spell_interval(metric: MetricResult) -> str:
    """Return mean and interval without words, for a table."""
    shown = shown_interval(metric)
    if shown is None:
        return "-"
    digits = _digits(metric)
    low, mean, high = (_signed(value, digits, is_relative=metric.is_relative) for value in (shown.low, shown.mean, shown.high))
    return f"{mean} [{low}, {high}]"


def spell_share(value: float, metric: MetricResult) -> str:
    """Return one pair's difference as the metric's are spelled."""
    return _signed(value, _digits(metric), is_relative=metric.is_relative)


def spell_margin(metric: MetricResult | Metric) -> str:
    """Return a margin: a percentage where it is a share of the control's value."""
    return f"{metric.margin * 100:.4g}%" if metric.is_relative else f"{metric.margin:.4g}"


def spell_level(level: float) -> str:
    """Return a confidence level, such as 90%; corrected ones have a digit more."""
    return f"{level * 100:.3g}%"


def _digits(metric: MetricResult) -> int:
    """Return how many decimals tell a tenth of the margin."""
    margin = metric.margin * 100 if metric.is_relative else metric.margin
    return min(8, max(0, 1 - math.floor(math.log10(margin))))


def _signed(value: float, digits: int, *, is_relative: bool) -> str:
    if not math.isfinite(value):
        return str(value)
    spelled = f"{value * 100:+,.{digits}f}%" if is_relative else f"{value:+,.{digits}f}"
    return spelled if float(spelled.rstrip("%").replace(",", "")) else spelled.lstrip("+-")


def spell_value(value: float) -> str:
    """Return a metric's value with the digits that a reader compares."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    return f"{value:,.4f}" if 0.01 <= abs(value) < 1e5 else f"{value:.4g}"


def spell_ratio(ratio: Interval) -> str:
    """Return a ratio with its interval where it has one."""
    if not (math.isfinite(ratio.low) and math.isfinite(ratio.high)) or ratio.low == ratio.high:
        return f"{ratio.mean:.3f}"
    return f"{ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def spell_amount(value: float, unit: str) -> str:
    """Return a cost's figure in its unit.

    >>> spell_amount(0.0123, "s"), spell_amount(3 * 2**20, "bytes")
    ('12.3 ms', '3.0 MiB')
    """
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if unit in ("bytes", "B"):
        return spell_bytes(value)
    return f"{value:,.0f} {unit}".rstrip() if abs(value) >= 100 else f"{value:.4g} {unit}".rstrip()


def spell_bytes(value: float) -> str:
    """Return a size in the unit that suits it."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{value / (1 << power):,.1f} {unit}"
    return f"{value:.0f} B"


def find_cost(result: ArmResult, name: str) -> Cost | None:
    """Return a cost by name."""
    return next((cost for cost in result.costs if cost.name == name), None)


def seeds_of(proof: Proof) -> list[int]:
    """Return the seeds that were run, in the order of the design."""
    ran = {run.seed for run in proof.runs}
    return [seed for seed in proof.experiment.all_seeds() if seed in ran]


def runs_of(proof: Proof, arm: str) -> list[Run]:
    """Return an arm's runs in the order of the design's seeds."""
    by_seed = {run.seed: run for run in proof.runs if run.arm == arm}
    return [by_seed[seed] for seed in seeds_of(proof) if seed in by_seed]


def spell_status(run: Run) -> str:
    """Return how a run ended in a few words."""
    if run.status is RunStatus.FINISHED:
        return "finished" if not run.skipped_steps else f"finished, {run.skipped_steps} steps skipped"
    step = f" at step {len(run.losses)}" if run.status is RunStatus.DIVERGED and run.losses else ""
    return f"{run.status}{step}{f': {run.message}' if run.message else ''}"


def design_rows(experiment: Experiment, num_looks: int, num_seeds: int) -> list[tuple[str, str]]:
    """Return the design as a table of words."""
    what = {
        Source.RECIPE: f"recipe {experiment.target}",
        Source.SCRIPT: f"script {experiment.target}",
        Source.CODE: f"code, {experiment.target}",
    }[experiment.source]
    rows = [("what trained", " ".join([what, *experiment.arguments]))]
    for number, arm in enumerate(experiment.arms):
        role = "control" if not number else "treatment"
        rows.append((f"{role} {arm.name}", ", ".join([arm.policy, *arm.settings])))
    seeds = f"{num_seeds} of {len(experiment.seeds)}" if num_seeds < len(experiment.seeds) else str(num_seeds)
    if experiment.is_sequential:
        seeds += f"; at least {len(experiment.seeds)}, up to {experiment.max_seeds} until decided, judged {num_looks} time{'s' * (num_looks != 1)}"
    rows += [
        ("seeds", seeds),
        ("steps", "as the program has it" if experiment.steps is None else f"{experiment.steps:,}"),
        ("primary metrics", _metrics_words(experiment, is_primary=True)),
        ("shown only", _metrics_words(experiment, is_primary=False)),
        ("alpha", f"{experiment.alpha:g}, the largest chance of a false verdict of equivalence"),
        ("the control had to learn", f"its loss to fall by {experiment.min_learning:.0%} or more"),
        ("digest of the design", experiment.digest),
    ]
    return [(key, value) for key, value in rows if value]


def _metrics_words(experiment: Experiment, *, is_primary: bool) -> str:
    return "; ".join(
        f"{name_words(metric.name)}, margin {spell_margin(metric)}{'' if metric.is_relative else ' in its own unit'}, "
        f"{metric.better} is better".replace("neither is better", "any difference counts")
        for metric in experiment.metrics
        if metric.is_primary is is_primary
    )


def next_steps(proof: Proof) -> list[str]:
    """Return what a reader may do next, for verdicts that leave something open."""
    lines = []
    for result in proof.results:
        metric = decisive(result)
        if result.verdict is Verdict.UNDECIDED and metric is not None:
            needed = result.seeds_needed or metric.seeds_needed
            if needed:
                lines.append(f"{result.arm}: about {needed} seeds would decide (--seeds {needed}; runs that exist are kept)")
            else:
                lines.append(
                    f"{result.arm}: the difference sits near the margin; decide before the next run whether "
                    f"{spell_margin(metric)} of {name_words(metric.name)} matters, and use fresh seeds"
                )
        if result.verdict is Verdict.WORSE:
            lines.append(f"{result.arm}: mezzotint audit --bisect names what has to stay in float32")
    return lines


def mean_memory(proof: Proof, arm: str) -> Mapping[str, float]:
    """Return an arm's bytes by class, and the peak, as means over its runs that measured them."""
    measured = [run.memory_bytes for run in runs_of(proof, arm) if run.memory_bytes]
    names = dict.fromkeys(name for sizes in measured for name in sizes)
    return {name: sum(sizes.get(name, 0) for sizes in measured) / len(measured) for name in names}
