"""The named formats. Adding one here makes it known everywhere, tests included."""

from difflib import get_close_matches
from typing import TypeVar

from mezzotint.errors import FormatError
from mezzotint.formats.spec import BlockFormat, FloatFormat, Specials

_Format = TypeVar("_Format", FloatFormat, BlockFormat)

FLOAT64 = FloatFormat(
    name="float64",
    bits=64,
    exponent_bits=11,
    mantissa_bits=52,
    bias=1023,
    specials=Specials.IEEE,
    specification="IEEE 754-2019 binary64",
    aliases=("fp64", "double"),
)
FLOAT32 = FloatFormat(
    name="float32",
    bits=32,
    exponent_bits=8,
    mantissa_bits=23,
    bias=127,
    specials=Specials.IEEE,
    specification="IEEE 754-2019 binary32",
    aliases=("fp32", "single", "float"),
)
TFLOAT32 = FloatFormat(
    name="tfloat32",
    bits=32,
    exponent_bits=8,
    mantissa_bits=10,
    bias=127,
    specials=Specials.IEEE,
    specification="NVIDIA A100 whitepaper (2020), 19 significant bits stored in 32",
    aliases=("tf32",),
)
BFLOAT16 = FloatFormat(
    name="bfloat16",
    bits=16,
    exponent_bits=8,
    mantissa_bits=7,
    bias=127,
    specials=Specials.IEEE,
    specification="Intel 338302-001, BFLOAT16 Hardware Numerics Definition (2018)",
    aliases=("bf16",),
)
FLOAT16 = FloatFormat(
    name="float16",
    bits=16,
    exponent_bits=5,
    mantissa_bits=10,
    bias=15,
    specials=Specials.IEEE,
    specification="IEEE 754-2019 binary16",
    aliases=("fp16", "half"),
)
FLOAT8_E4M3FN = FloatFormat(
    name="float8_e4m3fn",
    bits=8,
    exponent_bits=4,
    mantissa_bits=3,
    bias=7,
    specials=Specials.FN,
    specification="OCP 8-bit Floating Point Specification 1.0, E4M3",
    aliases=("e4m3", "e4m3fn", "fp8"),
)
FLOAT8_E5M2 = FloatFormat(
    name="float8_e5m2",
    bits=8,
    exponent_bits=5,
    mantissa_bits=2,
    bias=15,
    specials=Specials.IEEE,
    specification="OCP 8-bit Floating Point Specification 1.0, E5M2",
    aliases=("e5m2",),
)

FLOAT8_E4M3FNUZ = FloatFormat(
    name="float8_e4m3fnuz",
    bits=8,
    exponent_bits=4,
    mantissa_bits=3,
    bias=8,
    specials=Specials.FNUZ,
    specification="Noune et al. 2022, 8-bit Numerical Formats for Deep Neural Networks (arXiv 2206.02915)",
    aliases=("e4m3fnuz",),
)
FLOAT8_E5M2FNUZ = FloatFormat(
    name="float8_e5m2fnuz",
    bits=8,
    exponent_bits=5,
    mantissa_bits=2,
    bias=16,
    specials=Specials.FNUZ,
    specification="Noune et al. 2022, 8-bit Numerical Formats for Deep Neural Networks (arXiv 2206.02915)",
    aliases=("e5m2fnuz",),
)
FLOAT8_E8M0FNU = FloatFormat(
    name="float8_e8m0fnu",
    bits=8,
    exponent_bits=8,
    mantissa_bits=0,
    bias=127,
    specials=Specials.FN,
    specification="OCP Microscaling Formats (MX) Specification 1.0, E8M0",
    aliases=("e8m0",),
    is_signed=False,
    has_zero=False,
)
FLOAT6_E3M2FN = FloatFormat(
    name="float6_e3m2fn",
    bits=6,
    exponent_bits=3,
    mantissa_bits=2,
    bias=3,
    specials=Specials.NONE,
    specification="OCP Microscaling Formats (MX) Specification 1.0, FP6 E3M2",
    aliases=("e3m2",),
)
FLOAT6_E2M3FN = FloatFormat(
    name="float6_e2m3fn",
    bits=6,
    exponent_bits=2,
    mantissa_bits=3,
    bias=1,
    specials=Specials.NONE,
    specification="OCP Microscaling Formats (MX) Specification 1.0, FP6 E2M3",
    aliases=("e2m3",),
)
FLOAT4_E2M1FN = FloatFormat(
    name="float4_e2m1fn",
    bits=4,
    exponent_bits=2,
    mantissa_bits=1,
    bias=1,
    specials=Specials.NONE,
    specification="OCP Microscaling Formats (MX) Specification 1.0, FP4 E2M1",
    aliases=("e2m1", "fp4"),
)

FORMATS: tuple[FloatFormat, ...] = (
    FLOAT64,
    FLOAT32,
    TFLOAT32,
    BFLOAT16,
    FLOAT16,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E4M3FNUZ,
    FLOAT8_E5M2FNUZ,
    FLOAT8_E8M0FNU,
    FLOAT6_E3M2FN,
    FLOAT6_E2M3FN,
    FLOAT4_E2M1FN,
)


def _mx(name: str, element: FloatFormat, *aliases: str) -> BlockFormat:
    return BlockFormat(
        name=name,
        element=element,
        scale=FLOAT8_E8M0FNU,
        block_size=32,
        has_tensor_scale=False,
        specification="OCP Microscaling Formats (MX) Specification 1.0",
        aliases=aliases,
    )


BLOCK_FORMATS: tuple[BlockFormat, ...] = (
    _mx("mxfp8_e4m3", FLOAT8_E4M3FN, "mxfp8"),
    _mx("mxfp8_e5m2", FLOAT8_E5M2),
    _mx("mxfp6_e3m2", FLOAT6_E3M2FN, "mxfp6"),
    _mx("mxfp6_e2m3", FLOAT6_E2M3FN),
    _mx("mxfp4", FLOAT4_E2M1FN),
    BlockFormat(
        name="nvfp4",
        element=FLOAT4_E2M1FN,
        scale=FLOAT8_E4M3FN,
        block_size=16,
        has_tensor_scale=True,
        specification="NVIDIA, Pretraining Large Language Models with NVFP4 (arXiv 2509.25149)",
    ),
)

_BY_NAME = {word: fmt for fmt in FORMATS for word in (fmt.name, *fmt.aliases)}
_BLOCKS_BY_NAME = {word: fmt for fmt in BLOCK_FORMATS for word in (fmt.name, *fmt.aliases)}


def find_format(name: str) -> FloatFormat:
    """Return the format called `name`, by its full name or an alias, in any case.

    >>> find_format("bf16").max
    3.3895313892515355e+38

    Raises FormatError with the nearest known names.
    """
    return _find(name, _BY_NAME, "number format", [fmt.name for fmt in FORMATS])


def find_block_format(name: str) -> BlockFormat:
    """Return the block format called `name`, by its full name or an alias, in any case.

    Raises FormatError with the nearest known names.
    """
    return _find(name, _BLOCKS_BY_NAME, "block format", [fmt.name for fmt in BLOCK_FORMATS])


def _find(name: str, known: dict[str, _Format], kind: str, names: list[str]) -> _Format:
    found = known.get(name.strip().lower())
    if found is None:
        near = get_close_matches(name.lower(), known, n=3) or names
        raise FormatError(f"unknown {kind} {name!r}; did you mean {', '.join(near)}?")
    return found
