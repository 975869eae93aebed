"""The proof that `mezzotint claims` quotes on quality: mixed precision and bfloat16 weights, five pairs of runs each.

    python benchmarks/prove_claims.py --record benchmarks/records

The same experiment that `mezzotint claims no-quality-loss --run` carries out.
"""

import argparse
from pathlib import Path

import torch

import harness
from mezzotint.claims.quality import COMMAND, small_proof
from mezzotint.parity.result import Proof
from proof_records import as_record, verdict_table


def record(proof: Proof, folder: Path) -> Path:
    """Write the dated record of the proof."""
    tables = {f"`{COMMAND}`": verdict_table(proof)}
    return harness.write_record(folder, "prove_claims", tables, as_record(proof), harness.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="folder to write a dated record into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    proof = small_proof()
    print(verdict_table(proof))
    if args.record:
        print(record(proof, args.record))


if __name__ == "__main__":
    main()
