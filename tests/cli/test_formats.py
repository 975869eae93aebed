"""`mezzotint formats`: the table, values in every format, and one sentence for what is no number."""

import json
import math
from fractions import Fraction

import pytest
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.errors import FormatError
from mezzotint.formats.catalog import BLOCK_FORMATS, FORMATS
from mezzotint.formats.expressions import parse_number


def run(*args: str):
    return CliRunner().invoke(app, ["formats", *args], env={"COLUMNS": "120"})


def rows(value: str) -> dict[str, dict]:
    body = json.loads(run("--json", "--", value).stdout)
    assert body["schema"] == "mezzotint.formats/1"
    return {row["format"]: row for row in body["values"][0]["conversions"]}


def test_the_table_has_every_format() -> None:
    out = run().stdout
    assert all(fmt.name in out for fmt in (*FORMATS, *BLOCK_FORMATS))
    assert "65504" in out


def test_one_third() -> None:
    got = rows("1/3")
    assert got["float16"]["rounded"] == 0.333251953125
    assert got["float16"]["relative_error"] == pytest.approx(abs(0.333251953125 - 1 / 3) * 3)
    assert got["float16"]["code"] == 0x3555
    assert got["bfloat16"]["code"] == 0x3EAB
    assert got["float64"]["rounded"] == 1 / 3


@pytest.mark.parametrize(
    ("value", "name", "rounded", "note"),
    [
        ("65519", "float16", 65504.0, None),
        ("65520", "float16", "inf", "overflow: infinity"),
        ("65520", "bfloat16", 65536.0, None),
        ("1e-8", "float16", 0.0, "underflow to zero"),
        ("1e-7", "float16", 1.1920928955078125e-07, "subnormal"),
        ("0x1p-133", "bfloat16", 2.0**-133, "subnormal"),
        ("500", "float8_e4m3fn", "nan", "overflow: nan"),
        ("7", "float4_e2m1fn", 6.0, "overflow: saturate"),
        ("1", "float4_e2m1fn", 1.0, "exact"),
        ("-1", "float8_e8m0fnu", None, "-1 is negative and float8_e8m0fnu has no sign"),
        ("nan", "float6_e2m3fn", None, "float6_e2m3fn has no NaN"),
        ("inf", "float8_e4m3fn", "nan", "no infinity: nan"),
        ("1e400", "float64", "inf", "overflow: infinity"),
    ],
)
def test_ends_of_the_range(value: str, name: str, rounded: float | str | None, note: str | None) -> None:
    row = rows(value)[name]
    assert row["rounded"] == rounded
    assert row["note"] == note


def test_one_format_and_its_bits() -> None:
    out = run("--format", "fp16", "65504").stdout
    assert "0 11110 1111111111" in out
    assert "bfloat16" not in out


@pytest.mark.parametrize("text", ["1e-5000", "1e999999999", "0x1p99999999", "9**9**9", "-1e5000"])
def test_numbers_beyond_every_format_are_said_to_be(text: str) -> None:
    with pytest.raises(FormatError, match="needs more than 4096 bits"):
        parse_number(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-8", Fraction(1, 10**8)),
        ("0.1", Fraction(1, 10)),
        ("65_520", Fraction(65520)),
        ("1/3", Fraction(1, 3)),
        ("2**-24", Fraction(1, 2**24)),
        ("-2**-1", Fraction(-1, 2)),
        ("(1+2)*3-1", Fraction(8)),
        ("0x1p-133", Fraction(1, 2**133)),
        ("-0x1.8p1", Fraction(-3)),
        ("0xff", Fraction(255)),
        ("1e400", Fraction(10**400)),
        (" +5 ", Fraction(5)),
    ],
)
def test_numbers_are_exact(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


def test_not_finite_and_negative_zero() -> None:
    assert math.isnan(parse_number("nan"))
    assert parse_number("-inf") == -math.inf
    assert math.copysign(1, parse_number("-0.0")) == -1


@pytest.mark.parametrize(
    "text",
    ["", "abc", "1+", "__import__('os')", "9**9**9", "10**10**10", "1e999999999", "0x1p99999999", "2**0.5", "1/0",
     "(" * 500, "1j", "'a'", "[1]", "0x1pz", "True", "1 if 1 else 2"],
)  # fmt: skip
def test_garbage_gets_one_clear_sentence(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_number(text)
    assert "\n" not in str(caught.value)
    assert isinstance(run("--", text).exception, FormatError)
