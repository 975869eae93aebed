"""Claims on number formats: exact, by torch's casts and the catalogue's limits."""

import math

import torch

from mezzotint.claims.claim import Answer, Basis, Claim, Family, Figures, Verdict
from mezzotint.formats.catalog import (
    BFLOAT16,
    FLOAT8_E4M3FN,
    FLOAT8_E4M3FNUZ,
    FLOAT16,
    FLOAT32,
    TFLOAT32,
)
from mezzotint.formats.rounding import Rounding, round_scalar

_INFINITY = float("inf")


def cast(value: float, dtype: torch.dtype) -> float:
    """Return a float64 as torch stores it, by way of float32, as tensors are."""
    return float(torch.tensor(value, dtype=torch.float32).to(dtype))


def _float16_range() -> Figures:
    return {
        "largest": torch.finfo(torch.float16).max,
        "below_tie": cast(65519, torch.float16),
        "at_tie": cast(65520, torch.float16),
    }


def _judge_float16_range(found: Figures) -> Answer:
    is_true = found["largest"] == found["below_tie"] == FLOAT16.max < found["at_tie"] == _INFINITY
    return Answer(
        verdict=Verdict.TRUE if is_true else Verdict.FALSE,
        figure=f"the largest is {found['largest']:.0f}; numbers below 65520 still round to it, from 65520 on they "
        f"become "
        f"{'infinity' if math.isinf(found['at_tie']) else found['at_tie']}",
    )


def _judge_bfloat16_overflow(found: Figures) -> Answer:
    is_over = found["cast"] == _INFINITY
    return Answer(
        verdict=Verdict.FALSE if is_over else Verdict.TRUE,
        figure=f"its largest is {found['largest']:.4g}: the float32 number 3.4e38 becomes "
        f"{'infinity' if is_over else found['cast']}",
    )


def _same_range() -> Figures:
    return {
        "normal": torch.finfo(torch.bfloat16).smallest_normal,
        "float32_normal": torch.finfo(torch.float32).smallest_normal,
        "subnormal": BFLOAT16.smallest_subnormal,
        "float32_subnormal": FLOAT32.smallest_subnormal,
    }


def _judge_same_range(found: Figures) -> Answer:
    is_same = found["normal"] == found["float32_normal"]
    is_all = is_same and found["subnormal"] == found["float32_subnormal"]
    return Answer(
        verdict=Verdict.TRUE if is_all else Verdict.CONDITIONAL if is_same else Verdict.FALSE,
        condition="" if is_all or not is_same else "normal numbers are meant",
        figure=f"both begin at {found['normal']:.3g} and end at 3.4e38; subnormals go down to "
        f"{found['subnormal']:.2g} "
        f"against {found['float32_subnormal']:.2g}",
    )


def _digits() -> Figures:
    return {
        "kept_of_90": sum(round(cast(n / 10, torch.bfloat16), 1) == n / 10 for n in range(10, 100)),
        "lost_of_900": sum(round(cast(n / 100, torch.bfloat16), 2) != n / 100 for n in range(100, 1000)),
    }


def _judge_digits(found: Figures) -> Answer:
    is_true = found["kept_of_90"] == 90 and found["lost_of_900"] > 0
    return Answer(
        verdict=Verdict.TRUE if is_true else Verdict.FALSE,
        figure=f"{found['kept_of_90']} of the 90 numbers of two digits from 1.0 to 9.9 survive; of the 900 with "
        f"three "
        f"from 1.00 to 9.99, {found['lost_of_900']} do not",
    )


def _judge_more_precise(found: Figures) -> Answer:
    return Answer(
        verdict=Verdict.TRUE if found["ratio"] > 1 else Verdict.FALSE,
        figure=f"{found['ratio']:.0f} times: machine epsilon 2^-10 against 2^-7, while its range ends at 65504",
    )


def _small_updates() -> Figures:
    return {"added_0.001": cast(1.001, torch.bfloat16), "added_half_ulp": cast(1.0 + 2.0**-8, torch.bfloat16)}


def _judge_small_updates(found: Figures) -> Answer:
    is_lost = found["added_0.001"] == found["added_half_ulp"] == 1.0
    return Answer(
        verdict=Verdict.TRUE if is_lost else Verdict.FALSE,
        figure="at 1.0, an addition of up to 2^-8 = 0.0039 rounds away; that of an optimizer is often 0.001 or less",
    )


def _float16_gradients() -> Figures:
    return {"at": cast(2.0**-25, torch.float16), "above": cast(2.0**-25 * 1.001, torch.float16)}


def _judge_float16_gradients(found: Figures) -> Answer:
    is_lost = found["at"] == 0.0 < found["above"]
    return Answer(
        verdict=Verdict.TRUE if is_lost else Verdict.FALSE,
        figure="up to 2^-25 = 2.98e-8 they become 0; up to 6.1e-5 they are subnormal and have fewer than 11 bits",
    )


def _truncation() -> Figures:
    """Compare torch's cast with exact rounding, and with cutting off, on normal numbers."""
    numbers = torch.randn(2000, generator=torch.Generator().manual_seed(0)).tolist()
    theirs = [cast(number, torch.bfloat16) for number in numbers]
    nearest = [round_scalar(number, BFLOAT16) for number in numbers]
    cut = [round_scalar(number, BFLOAT16, Rounding.TOWARD_ZERO) for number in numbers]
    return {
        "is_nearest": theirs == nearest,
        "differs_from_cut": sum(one != other for one, other in zip(theirs, cut, strict=True)) / len(numbers),
    }


def _judge_truncation(found: Figures) -> Answer:
    return Answer(
        verdict=Verdict.FALSE if found["is_nearest"] and found["differs_from_cut"] > 0 else Verdict.TRUE,
        figure=f"torch rounds to nearest, ties to even; cutting off would differ for "
        f"{found['differs_from_cut']:.0%} of "
        "normal numbers",
    )


def _judge_tf32_bits(found: Figures) -> Answer:
    return Answer(
        verdict=Verdict.TRUE if found["bits"] == 32 else Verdict.FALSE,
        figure=f"{found['bits']} bits are used: float32's exponent and float16's mantissa (machine epsilon 2^-10)",
    )


def _judge_e4m3_end(found: Figures) -> Answer:
    is_fnuz = found["fnuz"] == 240 != found["fn"]
    return Answer(
        verdict=Verdict.CONDITIONAL if is_fnuz else Verdict.TRUE if found["fn"] == 240 else Verdict.FALSE,
        condition="it is float8_e4m3fnuz" if is_fnuz else "",
        figure=f"OCP's E4M3, torch.float8_e4m3fn, ends at {found['fn']:.0f}; float8_e4m3fnuz, of older AMD cards, at "
        f"{found['fnuz']:.0f}",
    )


def _e4m3_overflow() -> Figures:
    return {
        "torch": cast(_INFINITY, torch.float8_e4m3fn),
        "is_nan_by_the_standard": math.isnan(round_scalar(1000.0, FLOAT8_E4M3FN)),
        "version": torch.__version__.partition("+")[0],
    }


def _judge_e4m3_overflow(found: Figures) -> Answer:
    is_saturated = found["torch"] == 448
    return Answer(
        verdict=Verdict.CONDITIONAL if is_saturated and found["is_nan_by_the_standard"] else Verdict.TRUE,
        condition="the library does not saturate" if is_saturated else "",
        figure=f"torch {found['version']} saturates, and even infinity becomes 448; ml_dtypes gives NaN; here it "
        f"is an "
        "argument",
    )


def _compiled_cast() -> Figures:
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float()

    third = torch.tensor([1 / 3], dtype=torch.float32)
    return {
        "compiled": float(torch.compile(there_and_back)(third)),
        "eager": float(there_and_back(third)),
        "version": torch.__version__.partition("+")[0],
    }


def _judge_compiled_cast(found: Figures) -> Answer:
    is_same = found["compiled"] == found["eager"]
    return Answer(
        verdict=Verdict.TRUE if is_same else Verdict.FALSE,
        figure=f"1/3 comes back as {found['compiled']:.9g} from torch.compile, as {found['eager']:.9g} in eager mode"
        + ("" if is_same else ": the pair of casts is dropped"),
    )


_HANDBOOKS = "handbooks and forum answers"

NUMBER_FORMATS = (
    Claim(
        name="float16-range",
        family=Family.TUTORIAL,
        text="float16 overflows above 65504",
        where="tutorials; arXiv 1710.03740",
        verdict=Verdict.TRUE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 65504 65519 65520 --format float16",
        measure=_float16_range,
        judge=_judge_float16_range,
    ),
    Claim(
        name="float16-gradients",
        family=Family.TUTORIAL,
        text="float16 loses small gradients, so the loss must be scaled",
        where="tutorials; arXiv 1710.03740",
        verdict=Verdict.TRUE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 2.9e-8 1e-6 --format float16",
        measure=_float16_gradients,
        judge=_judge_float16_gradients,
    ),
    Claim(
        name="bfloat16-overflow",
        family=Family.FORMATS,
        text="bfloat16 cannot overflow",
        where=_HANDBOOKS,
        verdict=Verdict.FALSE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 3.4e38 --format bfloat16",
        measure=lambda: {"largest": torch.finfo(torch.bfloat16).max, "cast": cast(3.4e38, torch.bfloat16)},
        judge=_judge_bfloat16_overflow,
    ),
    Claim(
        name="bfloat16-range",
        family=Family.FORMATS,
        text="bfloat16 has float32's range",
        where="https://pytorch.org/blog/empowering-pytorch-on-intel-xeon-scalable-processors-with-bfloat16/",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.COMPUTED,
        command="mezzotint formats",
        measure=_same_range,
        judge=_judge_same_range,
    ),
    Claim(
        name="bfloat16-digits",
        family=Family.FORMATS,
        text="bfloat16 keeps two decimal digits",
        where=_HANDBOOKS,
        verdict=Verdict.TRUE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 9.87 --format bfloat16",
        measure=_digits,
        judge=_judge_digits,
    ),
    Claim(
        name="float16-precision",
        family=Family.FORMATS,
        text="float16 is more precise than bfloat16",
        where=_HANDBOOKS,
        verdict=Verdict.TRUE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 1/3",
        measure=lambda: {"ratio": torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float16).eps},
        judge=_judge_more_precise,
    ),
    Claim(
        name="bfloat16-updates",
        family=Family.FORMATS,
        text="bfloat16 weights stop moving when updates are small",
        where="https://github.com/pytorch/pytorch/issues/120376",
        verdict=Verdict.TRUE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 1.001 --format bfloat16",
        measure=_small_updates,
        judge=_judge_small_updates,
    ),
    Claim(
        name="cast-truncates",
        family=Family.FORMATS,
        text="A cast to bfloat16 cuts off the lower 16 bits",
        where=_HANDBOOKS,
        verdict=Verdict.FALSE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 1.006 --format bfloat16",
        measure=_truncation,
        judge=_judge_truncation,
    ),
    Claim(
        name="tf32-bits",
        family=Family.FORMATS,
        text="TF32 is a 32-bit format",
        where="https://infinitelexicon.com/TF32",
        verdict=Verdict.FALSE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 1/3 --format tfloat32",
        measure=lambda: {"bits": TFLOAT32.field_bits},
        judge=_judge_tf32_bits,
    ),
    Claim(
        name="e4m3-end",
        family=Family.FORMATS,
        text="float8 E4M3 ends at 240",
        where=_HANDBOOKS,
        verdict=Verdict.CONDITIONAL,
        basis=Basis.COMPUTED,
        command="mezzotint formats 240 448 --format e4m3",
        measure=lambda: {"fn": torch.finfo(torch.float8_e4m3fn).max, "fnuz": FLOAT8_E4M3FNUZ.max},
        judge=_judge_e4m3_end,
    ),
    Claim(
        name="e4m3-overflow",
        family=Family.FORMATS,
        text="float8 overflow gives NaN",
        where=_HANDBOOKS,
        verdict=Verdict.CONDITIONAL,
        basis=Basis.COMPUTED,
        command="mezzotint formats 1000 --format e4m3",
        measure=_e4m3_overflow,
        judge=_judge_e4m3_overflow,
    ),
    Claim(
        name="compiled-cast",
        family=Family.FORMATS,
        text="Casting to bfloat16 and back does the same under torch.compile",
        where="the meaning of a cast in eager mode",
        verdict=Verdict.FALSE,
        basis=Basis.MEASURED,
        command="mezzotint claims compiled-cast --run",
        measure=_compiled_cast,
        judge=_judge_compiled_cast,
        seconds=40,
    ),
)
