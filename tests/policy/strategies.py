"""Hypothesis strategies for every policy that can be built, and the settings they run under."""

from hypothesis import settings
from hypothesis import strategies as st

from mezzotint.formats.catalog import FORMATS
from mezzotint.policy.policy import Policy, Update
from mezzotint.policy.scaling import Scaling, ScalingKind

# a machine shared with other programs makes any single example slow
UNHURRIED = settings(deadline=None)

# a test of what is right while the code is not yet; strict, so that the mark has to go with the fault

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
    )
