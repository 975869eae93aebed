"""Hypothesis strategies for every policy that can be built, and the settings they run under."""

from hypothesis import settings
from hypothesis import strategies as st

from mezzotint.formats.catalog import BLOCK_FORMATS, FORMATS
from mezzotint.formats.inputs import InputRounding, ScaleGroup
from mezzotint.policy.policy import SAVED_FORMATS, Policy, Update
from mezzotint.policy.scaling import Scaling, ScalingKind

# a machine shared with other programs makes any single example slow
UNHURRIED = settings(deadline=None)

# a test of what is right while the code is not yet; strict, so that the mark has to go with the fault

MODULES = ("head", "blocks.0.attention", "blocks.*.norm", "net#2.0", "a-b_c", "*")

LARGEST_SCALE = 2.0**126
SMALLEST_SCALE = 2.0**-126


def scales(low=SMALLEST_SCALE, high=LARGEST_SCALE):
    return st.floats(low, high, allow_nan=False, allow_infinity=False, width=32)


@st.composite
def scalings(draw):
    kind = draw(st.sampled_from(ScalingKind))
    if kind is ScalingKind.NONE:
        return Scaling()
    floor, initial, ceiling = sorted(draw(st.lists(scales(), min_size=3, max_size=3)))
    return Scaling(
        kind=kind,
        initial=initial,
        growth_factor=draw(st.floats(1.0, 1e6, exclude_min=True)),
        backoff_factor=draw(st.floats(0.0, 1.0, exclude_min=True, exclude_max=True)),
        growth_interval=draw(st.integers(1, 10**9)),
        floor=floor,
        ceiling=ceiling,
        hysteresis=draw(st.integers(1, 10**6)),
        skip_budget=draw(st.integers(1, 10**6)),
    )


@st.composite
def policies(draw):
    everything = [fmt.name for fmt in FORMATS]
    names = [name for name in everything if name != "tfloat32"]  # nothing is stored in it
    update = draw(st.sampled_from(Update))
    params = draw(st.sampled_from(names if update is Update.PLAIN else [n for n in names if n != "float32"]))
    return Policy(
        params=params,
        compute=draw(st.sampled_from(everything)),
        loss=draw(st.sampled_from(names)),
        reduce=draw(st.sampled_from(names)),
        state=params if update is Update.PLAIN else "float32",
        scaling=draw(scalings()),
        update=update,
        products=draw(st.none() | roundings()),
        saved=draw(st.sampled_from(SAVED_FORMATS)),
        keep=tuple(draw(st.lists(st.sampled_from(MODULES), unique=True, max_size=3))),
    )


@st.composite
def roundings(draw):
    """How products round their inputs: every format that they may round to, every scale that fits it."""
    numbers = [fmt.name for fmt in FORMATS if fmt.bits <= 16 and fmt.is_signed]
    blocks = [fmt.name for fmt in BLOCK_FORMATS]
    inputs, gradients = draw(st.sampled_from(numbers + blocks)), draw(st.sampled_from(numbers + blocks))
    scale = draw(st.sampled_from(ScaleGroup)) if {inputs, gradients} <= set(numbers) else ScaleGroup.NONE
    history = draw(st.integers(0, 1024)) if scale is ScaleGroup.TENSOR else 0
    return InputRounding(
        inputs=inputs, gradients=gradients, scale=scale, history=history, is_stochastic=draw(st.booleans())
    )
