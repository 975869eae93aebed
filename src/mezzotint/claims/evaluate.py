"""Claims to outcomes: figures made now where that is quick or wished, else those of the record."""

import time
from collections.abc import Mapping, Sequence

from mezzotint.claims.catalog import CLAIMS
from mezzotint.claims.claim import Claim, Outcome
from mezzotint.claims.recorded import Recorded, records
from mezzotint.errors import ConfigError


def find_claims(words: Sequence[str]) -> tuple[Claim, ...]:
    """Return the claims with all the words in their name, text or family. Raises ConfigError where none has."""
    wanted = [word.lower() for word in words]
    found = tuple(
        claim for claim in CLAIMS if all(word in f"{claim.name} {claim.text} {claim.family}".lower() for word in wanted)
    )
    if not found:
        raise ConfigError(f"no claim has {' '.join(words)!r} in it; mezzotint claims lists all {len(CLAIMS)}")
    return found


def outcome_of(claim: Claim, *, is_run: bool = False, recorded: Mapping[str, Recorded] | None = None) -> Outcome:
    """Return the answer to a claim: by figures made now where that is quick, or with `is_run` wherever it can be.

    What cannot be measured here is quoted from the record, with the reason.
    """
    source = ""
    if claim.measure is not None and (claim.basis.is_quick or is_run):
        start = time.perf_counter()
        try:
            figures = claim.measure()
        except Exception as error:  # a machine without a compiler, without a kernel: what it lacks, it says
            if claim.basis.is_quick:
                raise
            source = f"; not measured here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            seconds = time.perf_counter() - start
            made = str(claim.basis) if claim.basis.is_quick else "measured here"
            return Outcome(claim=claim, answer=claim.judge(figures), figures=figures, source=made, seconds=seconds)
    record = (records() if recorded is None else recorded)[claim.name]
    return Outcome(
        claim=claim, answer=claim.judge(record.figures), figures=record.figures, source=f"{record.source}{source}"
    )
