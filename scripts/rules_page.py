"""docs/rules.md: every rule, from its own words."""

from mezzotint.rules.catalog import ALL_RULES
from mezzotint.rules.rule import Rule

INTRODUCTION = """\
# Rules

Made from `mezzotint.rules` by `python scripts/generate_docs.py`; `mezzotint rules` prints the list, `mezzotint rules
CODE` one of them. MZ2xx judge what a training step did (`mezzotint audit`), MZ3xx how a machine is set up
(`mezzotint doctor`). A code never changes meaning. Errors are wrong results or refusals, warnings damage numerics,
infos are worth knowing; errors and warnings make a command exit with 1. The severity is that of an ordinary case; where the evidence is weaker, a finding is milder.
"""


def page() -> str:
    """Return the page."""
    table = ["| code | name | severity | what it finds |", "|---|---|---|---|"]
    table += [f"| [{r.code}](#{r.code.lower()}) | {r.name} | {r.severity} | {r.summary} |" for r in ALL_RULES]
    return "\n".join([INTRODUCTION, *table, "", *(_section(rule) for rule in ALL_RULES)])


def _section(rule: Rule) -> str:  # type: ignore[type-arg]
    sources = "".join(f"\n\n<{source}>" for source in rule.sources)
    return (
        f"## {rule.code}\n\n**{rule.name}**: {rule.summary}. {rule.why} {rule.fix}\n\n"
        f"```python\n# bad\n{rule.bad}\n\n# good\n{rule.good}\n```{sources}\n"
    )
