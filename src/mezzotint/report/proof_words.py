"""A proof's figures and verdicts as words: what terminal, page and pull request have in common.

An equivalence names its margin and its interval, and "undecided" says what is missing: no sentence here says more than
the figures do.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from mezzotint.parity.design import Experiment, Metric, Source
from mezzotint.parity.result import ArmResult, Cost, Interval, MetricResult, Proof, Run, RunStatus, Verdict
from mezzotint.parity.spelling import spell_difference, spell_margin

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
_NAMES = {"curve": "loss curve"}
_MOST_NAMES = 3  # in a headline


def name_words(name: str) -> str:
    """Return a metric's or a cost's name as a reader's words."""
    return _NAMES.get(name, name.replace("_", " "))


def phrase(result: ArmResult, control: str) -> str:
    """Return the verdict in a few words, such as `bf16-mixed is equivalent to float32`.

    Worse and better say no more than was shown: a difference apart from 0 may still be less than the margin.
    """
    words = _PHRASES[result.verdict].format(arm=result.arm, control=control)
    shown = [
        one for one in result.metrics if one.verdict is result.verdict and one.reason in result.reasons and one.wide
    ]
    is_small = result.verdict in (Verdict.WORSE, Verdict.BETTER) and shown and not any(one.is_beyond for one in shown)
    return f"{words}, perhaps by less than the margin" if is_small else words


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
    """Return the verdict on one treatment with the figure that carries it."""
    return " ".join(filter(None, [f"{phrase(result, proof.experiment.control.name)}.", grounds(result)]))


def grounds(result: ArmResult) -> str:
    """Return why the verdict is what it is, as a sentence: the figure that carries it, else the first reason."""
    metric = carrying(result)
    if metric is None:
        return _stopped(result.reasons[0]) if result.reasons else ""
    name, _, reason = metric.reason.partition(": ")
    others = sum(one.is_primary for one in result.metrics) - 1
    more = ""
    if result.verdict is Verdict.EQUIVALENT and others:
        more = (
            "; the other primary metric is within its own"
            if others == 1
            else f"; so are the {others} other primary metrics"
        )
    pairs = f"{metric.num_pairs} pair{'s' * (metric.num_pairs != 1)}"
    return _stopped(f"{name_words(name)} over {pairs}: {reason}{more}")


def further_reasons(result: ArmResult) -> list[str]:
    """Return the reasons that neither `grounds` nor a table of the metrics gives, each as a sentence."""
    metric = carrying(result)
    given = {metric.reason if metric is not None else next(iter(result.reasons), "")}
    given |= {one.reason for one in result.metrics if one.verdict is Verdict.EQUIVALENT and ";" not in one.reason}
    return [_stopped(_named(reason, result)) for reason in result.reasons if reason not in given]


def _named(reason: str, result: ArmResult) -> str:
    """Return a reason with a metric's name in a reader's words."""
    name, colon, rest = reason.partition(": ")
    return f"{name_words(name)}: {rest}" if colon and any(name == one.name for one in result.metrics) else reason


def _stopped(text: str) -> str:
    """Return a text as a sentence; a name such as bf16-mixed at its start stays as it is."""
    text = text.strip().rstrip(".")
    is_word = text.partition(" ")[0].rstrip(":,").isalpha()
    return f"{text[:1].upper() if is_word else text[:1]}{text[1:]}." if text else ""


def carrying(result: ArmResult) -> MetricResult | None:
    """Return the metric whose figure carries the verdict; None where something else does, such as a divergence."""
    metric = decisive(result)
    is_given = metric is not None and metric.reason in result.reasons and metric.verdict is result.verdict
    return metric if is_given else None


def decisive(result: ArmResult) -> MetricResult | None:
    """Return the metric that shows the verdict: the first primary one of the same verdict, else the first of all."""
    primary = [one for one in result.metrics if one.is_primary]
    return next((one for one in primary if one.verdict is result.verdict), next(iter(primary), None))


def shown_interval(metric: MetricResult) -> Interval | None:
    """Return the interval that the metric's verdict was read from."""
    return metric.interval if metric.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL) else metric.wide


def spell_interval(metric: MetricResult) -> str:
    """Return the mean difference and the interval that its verdict was read from."""
    shown = shown_interval(metric)
    if shown is None:
        return "-"
    return f"{spell_share(shown.mean, metric)} [{spell_share(shown.low, metric)}, {spell_share(shown.high, metric)}]"


def spell_share(value: float, metric: MetricResult) -> str:
    """Return a difference as the metric's are spelled."""
    return spell_difference(value, metric.margin, is_relative=metric.is_relative)


def margin_words(metric: MetricResult | Metric) -> str:
    """Return a metric's margin."""
    return spell_margin(metric.margin, is_relative=metric.is_relative)


def spell_level(level: float) -> str:
    """Return a confidence level, such as 90%; corrected ones have a digit more."""
    return f"{level * 100:.3g}%"


def spell_value(value: float) -> str:
    """Return a metric's value with the digits that a reader compares."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    return f"{value:,.4f}" if 0.01 <= abs(value) < 1e5 or not value else f"{value:.3g}"


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
        looks = f"judged {num_looks} time{'s' * (num_looks != 1)}"
        seeds += f"; at least {len(experiment.seeds)}, up to {experiment.max_seeds} until decided, {looks}"
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
        f"{name_words(metric.name)}, margin {margin_words(metric)}{'' if metric.is_relative else ' in its own unit'}, "
        f"{metric.better} is better".replace("neither is better", "any difference counts")
        for metric in experiment.metrics
        if metric.is_primary is is_primary
    )


def next_steps(proof: Proof) -> list[str]:
    """Return what a reader may do next, for verdicts that leave something open."""
    lines = []
    for result in proof.results:
        metric = decisive(result)
        if result.verdict is not Verdict.UNDECIDED or metric is None:
            continue
        if needed := result.seeds_needed:
            lines.append(
                f"{result.arm}: about {needed} seeds would decide: a new proof with --seeds {needed}, or with "
                f"--max-seeds {math.ceil(1.5 * needed)}, which stops as soon as it is decided"
            )
        else:
            lines.append(
                f"{result.arm}: how many seeds would decide cannot be said; the difference of "
                f"{name_words(metric.name)} may sit at the margin of {margin_words(metric)}"
            )
    worse = [result.arm for result in proof.results if result.verdict is Verdict.WORSE]
    if worse and proof.experiment.source is Source.SCRIPT:
        lines.append(f"{listed(worse)}: mezzotint audit --bisect names the modules that have to stay in float32")
    return lines


def grouped(notes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return notes by what they begin with up to a colon, where neighbours share it; others alone, with an empty head.

    >>> grouped(["slow: a", "slow: b", "c: d"])
    [('slow', ['a', 'b']), ('', ['c: d'])]
    """
    found: list[tuple[str, list[str]]] = []
    for head, group in groupby(notes, key=lambda note: note.partition(": ")[0]):
        members = list(group)
        if len(members) > 1 and all(": " in note for note in members):
            found.append((head, [note.partition(": ")[2] for note in members]))
        else:
            found += [("", [note]) for note in members]
    return found


def main_costs(result: ArmResult) -> list[Cost]:
    """Return the costs without the classes of memory, the peak and what waits for backward apart."""
    kept = ("peak_memory", "activations_memory")
    return [cost for cost in result.costs if not cost.name.endswith("_memory") or cost.name in kept]


def mean_memory(proof: Proof, arm: str) -> Mapping[str, float]:
    """Return an arm's bytes by class, and the peak, as means over its runs that measured them."""
    measured = [run.memory_bytes for run in runs_of(proof, arm) if run.memory_bytes]
    names = dict.fromkeys(name for sizes in measured for name in sizes)
    return {name: sum(sizes.get(name, 0) for sizes in measured) / len(measured) for name in names}
