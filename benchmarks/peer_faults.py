"""Rounding faults of other libraries that the exact oracle finds, each reproduced, each beside mezzotint's answer.

    python benchmarks/peer_faults.py --record benchmarks/records

A fault is listed where a library's answer differs from the format's specification and the oracle's from neither; what
libraries legitimately differ in (overflow to NaN or to the largest number) is not counted, but for infinity.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import peers
from harness import machine, markdown_table, write_record
from mezzotint.formats.catalog import find_format
from mezzotint.formats.rounding import Rounding, round_scalar
from mezzotint.kernels.tensors import round_to, round_to_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One suspected fault: the input, what is right, what the library and what we say."""

    library: str
    what: str
    source: str
    right: str
    theirs: str
    ours: str

    @property
    def is_fault(self) -> bool:
        return self.theirs != self.right

    @property
    def is_ours(self) -> bool:
        return self.ours != self.right


def spell(tensor: Tensor) -> str:
    return ", ".join(f"{float(x):.9g}" for x in tensor.flatten())


def ties(format_name: str) -> Tensor:
    """Return numbers exactly between two neighbours of a format, from its subnormals to its largest."""
    fmt = find_format(format_name)
    found = []
    for exponent in range(fmt.min_exponent - 1, fmt.max_exponent + 1):
        place = 2.0 ** (max(exponent, fmt.min_exponent) - fmt.mantissa_bits)
        start = 0.0 if exponent < fmt.min_exponent else 2.0**exponent
        found += [start + (step + 0.5) * place for step in range(min(1 << fmt.mantissa_bits, 8))]
    numbers = torch.tensor([x for x in found if x < fmt.max], dtype=torch.float64)
    return numbers[numbers.float().double() == numbers].float()


def exact(source: Tensor, format_name: str) -> Tensor:
    fmt = find_format(format_name)
    return torch.tensor([round_scalar(float(x), fmt) for x in source])


def ties_claim(library: str, rounder: Callable[[Tensor], Tensor], format_name: str) -> Claim:
    source = ties(format_name)
    right = exact(source, format_name)
    wrong = int((rounder(source) != right).sum())
    ours = int((round_to(source, format_name) != right).sum())
    example = source[rounder(source) != right][:1] if wrong else source[:1]
    return Claim(
        library=library,
        what=f"ties of {format_name} that do not go to even",
        source=f"{source.numel()} ties, such as {spell(example)}",
        right="0 wrong",
        theirs=f"{wrong} wrong",
        ours=f"{ours} wrong",
    )


def values_claim(
    library: str, what: str, rounder: Callable[[Tensor], Tensor], values: list[float], format_name: str
) -> Claim:
    source = torch.tensor(values)
    return Claim(
        library=library,
        what=what,
        source=f"{spell(source)} to {format_name}",
        right=spell(exact(source, format_name)),
        theirs=spell(rounder(source.clone())),
        ours=spell(round_to(source, format_name)),
    )


def claims() -> list[Claim]:
    found = []
    half, e4m3, bf16 = (peers.rounders(name, with_compile=True) for name in ("float16", "float8_e4m3fn", "bfloat16"))
    for library in ("qtorch", "unit-scaling", "microxcaling", "pychop", "gfloat", "ml_dtypes", "torch"):
        if library in half:
            found.append(ties_claim(library, half[library], "float16"))
    if "pychop" in half:
        found.append(values_claim("pychop", "overflow becomes 0", half["pychop"], [70000.0], "float16"))
        found.append(values_claim("pychop", "the sign of zero is lost", half["pychop"], [-0.0], "float16"))
    if "qtorch" in half:
        found.append(values_claim("qtorch", "no overflow", half["qtorch"], [torch.inf, 100000.0], "float16"))
        found.append(values_claim("qtorch", "NaN becomes a number", half["qtorch"], [torch.nan], "float16"))
    if "unit-scaling" in bf16:
        largest = [2.0**127]
        found.append(values_claim("unit-scaling", "bfloat16 ends early", bf16["unit-scaling"], largest, "bfloat16"))
    infinite = torch.tensor([torch.inf])
    found.append(
        Claim(
            library="torch",
            what="infinity becomes the largest number, with no mode asked for",
            source="inf to float8_e4m3fn",
            right="nan",
            theirs=spell(e4m3["torch"](infinite)),
            ours=spell(round_to(infinite, "e4m3")),
        )
    )
    found.append(
        values_claim("torch.compile", "a cast to bfloat16 and back is dropped", bf16["torch.compile"], [1 / 3], "bf16")
    )
    found += block_claims() + stochastic_claims()
    return found


def block_claims() -> list[Claim]:
    tiny = torch.full((1, 32), 2.0**-125)
    infinite = torch.full((1, 32), 3.0)
    infinite[0, 0] = torch.inf
    found = []
    for library, rounder in peers.block_rounders().items():
        found.append(
            Claim(
                library=library,
                what="a block of tiny numbers comes back changed",
                source="32 x 2^-125 to mxfp8_e4m3",
                right=spell(tiny[0, :1]),
                theirs=spell(rounder(tiny.clone())[0, :1]),
                ours=spell(round_to_blocks(tiny, "mxfp8")[0, :1]),
            )
        )
        theirs = rounder(infinite.clone())[0]
        found.append(
            Claim(
                library=library,
                what="an infinity in a block passes unnoticed",
                source="inf and 31 x 3.0 to mxfp8_e4m3",
                right="seen",
                theirs="seen" if not theirs.isfinite().all() else f"lost, becomes {spell(theirs[:2])}",
                ours="seen" if not round_to_blocks(infinite, "mxfp8").isfinite().all() else "lost",
            )
        )
    return found


def stochastic_claims() -> list[Claim]:
    nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32).expand(4096).clone()

    def kinds(out: Tensor) -> str:
        return "all NaN" if bool(out.float().isnan().all()) else f"{int((~out.float().isnan()).sum())} of 4096 numbers"

    ours = round_to(nan, "bf16", rounding=Rounding.STOCHASTIC)
    return [
        Claim(
            library=f"{library}, stochastic",
            what="a NaN with payload becomes a number",
            source="NaN 0xffffffff to bfloat16",
            right="all NaN",
            theirs=kinds(rounder(nan.clone())),
            ours=kinds(ours),
        )
        for library, rounder in peers.stochastic_rounders().items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    found = claims()
    rows = [[c.library, c.what, c.source, c.right, c.theirs, c.ours, "fault" if c.is_fault else "right"] for c in found]
    table = markdown_table(["library", "suspected", "input", "right", "theirs", "mezzotint", "verdict"], rows)
    print(table)
    if any(c.is_ours for c in found):
        raise SystemExit("mezzotint has a fault of its own")
    if args.record:
        keys = ("library", "what", "source", "right", "theirs", "ours", "verdict")
        results = [dict(zip(keys, row, strict=True)) for row in rows]
        print(write_record(args.record, "peer_faults", {"Rounding": table}, results, machine() | peers.versions()))


if __name__ == "__main__":
    main()
