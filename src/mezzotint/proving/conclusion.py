"""From runs to a proof: verdicts, the machine, notes, and the three files that tell it."""

import datetime
import json
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mezzotint.errors import TrainingError
from mezzotint.hardware import host
from mezzotint.hardware.probe import probe
from mezzotint.parity.result import Proof, Run
from mezzotint.parity.sequential import num_looks
from mezzotint.parity.verdict import judge
from mezzotint.proving.slowness import why_no_speedup
from mezzotint.proving.store import ProofFolder
from mezzotint.report.proof import proof_page
from mezzotint.report.proof_text import markdown
from mezzotint.torch_internals.registry import Feature
from mezzotint.torch_internals.registry import notes as missing_notes
from mezzotint.training.loop import environment
from mezzotint.version import package_version


def conclude(folder: ProofFolder, runs: Sequence[Run]) -> Proof:
    """Judge the runs and return the proof; `write_proof` puts it on disk."""
    experiment = folder.experiment
    results = judge(experiment, runs)
    return Proof(
        experiment=experiment,
        runs=tuple(runs),
        results=results,
        machine=machine_facts(),
        command=str(folder.circumstances.get("command", "")),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        num_looks=num_looks(experiment, runs),
        notes=(*why_no_speedup(folder, results), *missing_notes(Feature.PROOF)),
    )


def write_proof(folder: ProofFolder, proof: Proof) -> list[str]:
    """Write proof.json, report.html and summary.md; return a sentence for each that the disk did not take."""
    body = json.dumps({"schema": "mezzotint.proof/1", **finite(proof.to_json())}, indent=1, allow_nan=False)
    refusals = []
    texts = {"proof.json": body, "report.html": proof_page(proof), "summary.md": markdown(proof)}
    for name, text in texts.items():
        try:
            folder.write(name, text)
        except TrainingError as error:
            refusals.append(str(error))
    return refusals


def machine_facts() -> dict[str, str]:
    """Return what the figures depend on besides the design."""
    facts = probe(None)
    memory = host.memory_bytes()
    found = {
        "device": facts.device,
        "processor" if facts.kind == "cpu" else "card": facts.name,
        "threads": str(torch.get_num_threads()),
        "cpu capability": environment()["cpu_capability"],
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "mezzotint": package_version(),
    }
    return {key: value for key, value in found.items() if value}


def finite(value: Any) -> Any:
    """Return JSON with NaN and infinities spelled as texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
