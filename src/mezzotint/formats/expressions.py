"""Numbers as people type them: 1e-8, 65520, 1/3, 2**-24, 0x1p-133, -inf, nan; exact, and nothing else is run."""

import ast
import re
from collections.abc import Callable
from fractions import Fraction

from mezzotint.errors import FormatError

MAX_BITS = 4096  # of a numerator or denominator; float64 needs 1074, and a tower of powers would not end
_HEX_FLOAT = re.compile(r"[+-]?0[xX][0-9a-fA-F]*\.?[0-9a-fA-F]*[pP][+-]?\d+")
_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def parse_number(text: str) -> Fraction | float:
    """Return the exact number that `text` spells; a float for NaN, the infinities and negative zero.

    >>> parse_number("1/3"), parse_number("0x1p-2"), parse_number("1e-1")
    (Fraction(1, 3), Fraction(1, 4), Fraction(1, 10))

    Raises FormatError for anything that is not a number or a sum, product, quotient or power of numbers.
    """
    word = text.strip().lower()
    if re.fullmatch(r"[+-]?(nan|inf|infinity)", word):
        return float(word)
    try:
        is_hex = _HEX_FLOAT.fullmatch(word)
        value = _hex_float(word) if is_hex else _value(ast.parse(word, mode="eval").body, word)
    except FormatError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _garbage(text) from None
    except ZeroDivisionError:
        raise FormatError(f"{text!r} divides by zero; write inf for an infinity") from None
    return -0.0 if value == 0 and word.startswith("-") else value


def _hex_float(word: str) -> Fraction:
    """Return a hexadecimal number with a binary exponent, without float64 rounding it."""
    digits, _, exponent = word.lower().partition("p")
    whole, _, fraction = digits.replace("0x", "", 1).lstrip("+-").partition(".")
    if abs(int(exponent)) > MAX_BITS:
        raise _too_large(word)
    magnitude = Fraction(int(whole + fraction, 16), 16 ** len(fraction)) * Fraction(2) ** int(exponent)
    return -magnitude if word.startswith("-") else magnitude


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _literal(ast.get_source_segment(text, node) or "", text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Pow):
            return _power(left, right, text)
        if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](left, right), text)
    raise _garbage(text)


def _literal(word: str, text: str) -> Fraction:
    """Return a decimal, binary, octal or hexadecimal literal exactly, as it was written."""
    word = word.replace("_", "")
    if word[:2] in ("0x", "0b", "0o"):
        return _bounded(Fraction(int(word, 0)), text)
    exponent = re.search(r"e([+-]?\d+)$", word)
    if exponent and abs(int(exponent[1])) > MAX_BITS // 4:
        raise _too_large(text)
    return _bounded(Fraction(word), text)


def _power(base: Fraction, exponent: Fraction, text: str) -> Fraction:
    if exponent.denominator != 1:
        raise FormatError(f"{text!r} has a power that is no whole number; write the number itself")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size * abs(exponent) > 2 * MAX_BITS:
        raise _too_large(text)
    return _bounded(base ** int(exponent), text)


def _bounded(value: Fraction, text: str) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _too_large(text)
    return value


def _garbage(text: str) -> FormatError:
    return FormatError(f"{text!r} is not a number; write one like 1e-8, 65520, 1/3, 2**-24, 0x1p-133, inf or nan")


def _too_large(text: str) -> FormatError:
    return FormatError(f"{text!r} needs more than {MAX_BITS} bits, beyond every format here; float64 ends near 1.8e308")
