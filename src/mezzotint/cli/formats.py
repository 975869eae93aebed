"""`mezzotint formats`: the number formats side by side, and what becomes of given values in each."""

import math
from fractions import Fraction
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mezzotint.cli.output import JsonOption, print_json, result_console
from mezzotint.errors import FormatError
from mezzotint.formats.catalog import BLOCK_FORMATS, FORMATS, find_format
from mezzotint.formats.codec import encode
from mezzotint.formats.expressions import parse_number
from mezzotint.formats.rounding import default_overflow, overflows, round_scalar, ulp_at
from mezzotint.formats.spec import BlockFormat, FloatFormat

WIDE = 11  # bits of a field; a wider one is shown in hexadecimal
FIELD_STYLES = ("red", "green", "blue")  # sign, exponent, mantissa


def formats(
    values: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers such as 1e-8, 65520, 1/3, 2**-24, 0x1p-133.", show_default=False),
    ] = None,
    format_names: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="Show this format only. Repeatable.", show_default=False),
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Compare the number formats, or show what becomes of values in each."""
    chosen = tuple(find_format(name) for name in format_names) if format_names else FORMATS
    numbers = [(text, parse_number(text)) for text in values or []]
    conversions = [(text, [convert(value, fmt) for fmt in chosen]) for text, value in numbers]
    if is_json:
        blocks = () if format_names else BLOCK_FORMATS
        print_json(
            "formats",
            {
                "formats": [describe(fmt) for fmt in chosen],
                "block_formats": [describe_block(fmt) for fmt in blocks],
                "values": [{"value": text, "conversions": rows} for text, rows in conversions],
            },
        )
        return
    console = result_console()
    if not numbers:
        console.print(comparison(chosen))
        if not format_names:
            console.print()
            console.print(block_table())
        return
    for index, (text, rows) in enumerate(conversions):
        if index:
            console.print()
        console.print(conversion_table(text, rows))


def describe(fmt: FloatFormat) -> dict[str, Any]:
    """Return a format's fields and limits."""
    return {
        "name": fmt.name,
        "aliases": list(fmt.aliases),
        "bits": fmt.bits,
        "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits,
        "bias": fmt.bias,
        "max": fmt.max,
        "smallest_normal": fmt.smallest_normal,
        "smallest_subnormal": fmt.smallest_subnormal,
        "epsilon": fmt.epsilon,
        "decimal_digits": fmt.decimal_digits,
        "has_infinity": fmt.has_infinity,
        "num_nans": fmt.num_nans,
        "specification": fmt.specification,
    }


def describe_block(fmt: BlockFormat) -> dict[str, Any]:
    """Return a block format's parts and its bits per element."""
    return {
        "name": fmt.name,
        "element": fmt.element.name,
        "scale": fmt.scale.name,
        "block_size": fmt.block_size,
        "has_tensor_scale": fmt.has_tensor_scale,
        "bits": fmt.bits,
        "specification": fmt.specification,
    }


def convert(value: Fraction | float, fmt: FloatFormat) -> dict[str, Any]:
    """Return what becomes of `value` in `fmt`: code, rounded value, errors, ulp, and a note on the end of the range."""
    row: dict[str, Any] = {"format": fmt.name, "code": None, "rounded": None, "note": None}
    row |= {"absolute_error": None, "relative_error": None, "ulp": None}
    try:
        rounded = round_scalar(value, fmt)
    except FormatError as refusal:
        return row | {"note": str(refusal).split(";")[0]}
    row |= {"rounded": rounded, "code": encode(rounded, fmt), "note": note(value, rounded, fmt)}
    if isinstance(value, Fraction) or math.isfinite(value):
        exact = Fraction(value)
        row["ulp"] = float(ulp_at(exact, fmt)) if abs(exact) <= Fraction(fmt.max) else None
        if math.isfinite(rounded):
            error = abs(Fraction(rounded) - exact)
            row["absolute_error"] = _float(error)
            row["relative_error"] = _float(error / abs(exact)) if exact else 0.0
    return row


def note(value: Fraction | float, rounded: float, fmt: FloatFormat) -> str | None:
    """Return what the end of the range did to a number, in a word or two."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if str(value) == str(rounded) else f"no infinity: {default_overflow(fmt)}"
    if overflows(Fraction(value), fmt):
        return f"overflow: {default_overflow(fmt)}"
    if rounded == 0 and value != 0:
        return "underflow to zero"
    if rounded != 0 and abs(rounded) < fmt.smallest_normal:
        return "subnormal"
    return "exact" if Fraction(rounded) == Fraction(value) else None


def comparison(chosen: tuple[FloatFormat, ...]) -> Table:
    """Return the formats side by side; fits 80 columns."""
    table = Table(box=None, pad_edge=False)
    for column in ("format", "bits"):
        table.add_column(column, no_wrap=True)
    for column in ("largest", "normal", "smallest", "epsilon", "digits", "inf"):
        table.add_column(column, justify="right", no_wrap=True)
    for fmt in chosen:
        limits = (fmt.max, fmt.smallest_normal, fmt.smallest_subnormal, fmt.epsilon)
        table.add_row(
            fmt.name,
            f"{int(fmt.is_signed)}+{fmt.exponent_bits}+{fmt.mantissa_bits}",
            *(_limit(limit) for limit in limits),
            str(fmt.decimal_digits),
            "yes" if fmt.has_infinity else "no",
        )
    table.caption = "bits: sign + exponent + mantissa; smallest: with subnormals; digits: decimal digits always kept"
    table.caption_justify = "left"
    return table


def block_table() -> Table:
    """Return the block formats side by side."""
    table = Table(box=None, pad_edge=False)
    for column in ("block format", "element", "scale", "block", "bits each"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("block", "bits each") else "left")
    for fmt in BLOCK_FORMATS:
        scale = fmt.scale.name + (" + float32" if fmt.has_tensor_scale else "")
        table.add_row(fmt.name, fmt.element.name, scale, str(fmt.block_size), f"{fmt.bits:g}")
    return table


def conversion_table(text: str, rows: list[dict[str, Any]]) -> Table:
    """Return what becomes of one value in each format, its bits coloured by field."""
    table = Table(title=text, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("format", no_wrap=True)
    for column in ("rounded", "rel. error", "ulp"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("sign exponent mantissa", no_wrap=True)
    table.add_column("note")
    for row in rows:
        fmt = find_format(row["format"])
        table.add_row(
            fmt.name,
            "-" if row["rounded"] is None else f"{row['rounded']:.10g}",
            "-" if row["relative_error"] is None else f"{row['relative_error']:.2g}",
            "-" if row["ulp"] is None else f"{row['ulp']:.2g}",
            Text("-") if row["code"] is None else bits(row["code"], fmt),
            row["note"] or "",
        )
    return table


def bits(code: int, fmt: FloatFormat) -> Text:
    """Return a code point's bits, the fields apart and coloured; a wide mantissa in hexadecimal."""
    digits = f"{code:0{fmt.field_bits}b}"
    fields = (digits[: fmt.is_signed], digits[fmt.is_signed : fmt.is_signed + fmt.exponent_bits],
              digits[fmt.is_signed + fmt.exponent_bits :])  # fmt: skip
    shown = [
        (f"0x{int(part, 2):x}" if len(part) > WIDE else part, style)
        for part, style in zip(fields, FIELD_STYLES, strict=True)
    ]
    return Text(" ").join(Text(part, style=style) for part, style in shown if part)


def _float(value: Fraction) -> float:
    """Return the nearest float64, infinity included, which Python's own conversion refuses."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _limit(value: float) -> str:
    return str(int(value)) if value.is_integer() and value < 1e6 else f"{value:.3g}"
