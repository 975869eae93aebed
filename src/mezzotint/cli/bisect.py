"""`mezzotint audit --bisect`: measure, module by module, what has to stay in float32, and say it as a policy."""

from typing import TYPE_CHECKING

from rich.text import Text

from mezzotint.cli.output import print_json, progress_console, result_console

if TYPE_CHECKING:
    from mezzotint.auditing.bisect import BisectResult, Evaluation
    from mezzotint.auditing.script import Target

_SEED = 0


def find_islands(target: "Target", *, metric: str, tolerance: float, steps: int, is_json: bool) -> int:
    """Run the search on a script and print what it found; return the exit code: 0 if the policy is within tolerance."""
    from mezzotint.auditing.bisect import Ending, bisect, candidate_tree
    from mezzotint.auditing.script import as_program
    from mezzotint.auditing.sensitivity import error_function
    from mezzotint.torch_internals.registry import Feature
    from mezzotint.torch_internals.registry import notes as missing_notes

    progress = progress_console()
    updates = steps if metric == "loss" else 1
    error, paths = error_function(as_program(target, updates + 1), metric=metric, steps=updates, seed=_SEED)
    roots = [path for path in paths if "." not in path]

    def tell(evaluation: "Evaluation") -> None:
        kept = ", ".join(evaluation.keep) or "nothing"
        progress.print(f"error {evaluation.error:.3g} with {kept} in float32", markup=False, soft_wrap=True)

    # one model's name is no part of a policy, whose paths are relative to it
    shown = [path for path in paths if path not in roots] if len(roots) == 1 else paths
    result = bisect(candidate_tree(shown or paths), error, tolerance=tolerance, on_evaluation=tell)
    prefix = f"{roots[0]}." if len(roots) == 1 else ""
    keep = "|".join(path.removeprefix(prefix) for path in result.keep)
    if is_json:
        print_json("bisect", _payload(result, keep, metric, target) | {"notes": missing_notes(Feature.BISECT)})
    else:
        console = result_console()
        for line in _lines(result, keep, metric):
            console.print(Text(line), soft_wrap=True)
        for note in missing_notes(Feature.BISECT):
            console.print(Text(note), soft_wrap=True)
    return 1 if result.ending is Ending.NOT_ENOUGH else 0


def _lines(result: "BisectResult", keep: str, metric: str) -> list[str]:
    from mezzotint.auditing.bisect import Ending

    what = "gradient" if metric == "gradient" else "loss"
    before = f"{what} error {result.error_before:.3g} against float32"
    counted = f"{len(result.evaluations)} measurements"
    if result.ending is Ending.NOT_NEEDED:
        return [f"{before}, within the tolerance of {result.tolerance:g}: nothing has to stay in float32"]
    if result.ending is Ending.NOT_ENOUGH:
        return [
            f"{before}, and {result.error_all:.3g} with every module in float32, beyond the tolerance of "
            f"{result.tolerance:g}: what is computed outside modules, or the tolerance, is the reason"
        ]
    lines = [
        f"keep={keep}",
        f"{before}; {result.error_after:.3g} with these modules in float32 (tolerance {result.tolerance:g}, {counted})",
        f'engine: mz.Engine(model, optimizer, policy="bf16-mixed, keep={keep}")',
    ]
    if result.ending is Ending.BUDGET:
        lines.append("the search ran out of measurements: a smaller set may do")
    return lines


def _payload(result: "BisectResult", keep: str, metric: str, target: "Target") -> dict[str, object]:
    return {
        "command": str(target),
        "metric": metric,
        "ending": str(result.ending),
        "keep": keep or None,
        "modules": list(result.keep),
        "error_before": result.error_before,
        "error_all": result.error_all,
        "error_after": result.error_after,
        "tolerance": result.tolerance,
        "evaluations": [{"keep": list(one.keep), "error": one.error} for one in result.evaluations],
    }
