"""Policy: which number format each part of a training step uses, one field per axis.

The engine applies it, the audit checks it, the plan costs it, the checkpoint stores it. Text and object are twins:

>>> str(Policy(compute="bf16"))
'params=float32, compute=bfloat16, loss=float32, reduce=float32, state=float32, scaling=none'
>>> Policy.parse("bf16-mixed") == Policy(compute="bf16")
True

The module knows format names, not torch dtypes, so that it loads without torch.
"""

import re
from dataclasses import dataclass, field, fields
from enum import StrEnum

from mezzotint.errors import FormatError, PolicyError, echoed
from mezzotint.formats.catalog import find_format
from mezzotint.formats.inputs import InputRounding
from mezzotint.policy.scaling import Scaling


class Update(StrEnum):
    """How an optimizer's float32 result becomes a stored weight."""

    PLAIN = "plain"  # the optimizer steps the stored weights themselves
    MASTER = "master"  # it steps float32 master copies; the stored weights are their rounding
    STOCHASTIC = "stochastic"  # it steps temporary float32 copies, rounded up or down at random, right on average
    KAHAN = "kahan"  # it steps weight + compensation; the rounding error is kept for the next step


SAVED_FORMATS = ("float32", "bfloat16")
FORMAT_AXES = ("params", "compute", "loss", "reduce", "state")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The number formats of a training step.

    Fields: `params` stored weights; `compute` operations that autocast lowers (matmul, convolution, attention);
    `loss` the scalar that backward starts from; `reduce` gradients while they are accumulated and reduced across
    devices; `state` optimizer states; `scaling` of the loss before backward; `update` how weights are written;
    `products` the formats to which linear layers round the inputs of their three products, if any; `saved` the format
    in which float32 activations wait for backward; `keep` the modules that stay in float32, by their paths in the
    model, in which `*` stands for anything ("head", "blocks.*.norm").

    Format fields take a name or alias ("bf16") and keep the full name. Raises PolicyError where fields contradict
    each other; whether a device can run it is another question (`mezzotint.policy.choose`).
    """

    params: str = "float32"
    compute: str = "float32"
    loss: str = "float32"
    reduce: str = "float32"
    state: str = "float32"
    scaling: Scaling = field(default_factory=Scaling)
    update: Update = Update.PLAIN
    products: InputRounding | None = None
    saved: str = "float32"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Spell formats in full and refuse contradictions."""
        for axis in FORMAT_AXES:
            name = _format_name(axis, getattr(self, axis))
            if name == "tfloat32" and axis != "compute":
                raise PolicyError(
                    f"{axis}=tfloat32 is refused: tfloat32 is how tensor cores read float32 in a product, nothing is "
                    f"stored in it; pass {axis}=float32"
                )
            object.__setattr__(self, axis, name)
        if not isinstance(self.scaling, Scaling):
            raise PolicyError(f"scaling must be a Scaling, not {self.scaling!r}; write parse_policy('scaling=...')")
        object.__setattr__(self, "update", _choice(self.update))
        if self.products is not None and not isinstance(self.products, InputRounding):
            raise PolicyError(
                f"products must be an InputRounding or None, not {echoed(self.products)}; write "
                "Policy.parse('products=mxfp8')"
            )
        object.__setattr__(self, "saved", _format_name("saved", self.saved))
        if self.saved not in SAVED_FORMATS:
            raise PolicyError(f"saved={self.saved} is refused; pass {' or '.join(SAVED_FORMATS)}")
        object.__setattr__(self, "keep", _kept(self.keep))
        if self.update is Update.PLAIN:
            if self.state != self.params:
                raise PolicyError(
                    f"state={self.state} with params={self.params} and update=plain is refused: torch optimizers keep "
                    f"their states in the format of the weights; pass state={self.params} or update=master"
                )
        elif self.params == "float32":
            raise PolicyError(
                f"update={self.update} with params=float32 is refused: float32 weights need no {self.update} "
                "update; pass params=bfloat16 or update=plain"
            )
        elif self.state != "float32":
            raise PolicyError(
                f"state={self.state} with update={self.update} is refused: the optimizer steps float32 copies, "
                "so its states are float32; pass state=float32"
            )

    def __str__(self) -> str:
        words = [f"{axis}={getattr(self, axis)}" for axis in FORMAT_AXES]
        words.append(f"scaling={self.scaling}")
        if self.update is not Update.PLAIN:
            words.append(f"update={self.update}")
        if self.products is not None:
            words.append(f"products={self.products}")
        if self.saved != "float32":
            words.append(f"saved={self.saved}")
        if self.keep:
            words.append(f"keep={'|'.join(self.keep)}")
        return ", ".join(words)

    @classmethod
    def parse(cls, text: "str | Policy") -> "Policy":
        """Return the policy named or spelled by `text`; see `mezzotint.policy.grammar.parse_policy`."""
        from mezzotint.policy.grammar import parse_policy

        return parse_policy(text)

    @property
    def is_mixed(self) -> bool:
        """Whether operations run in another format than the float32 of loss and update."""
        return self.compute != "float32"


POLICY_FIELDS = tuple(f.name for f in fields(Policy))


def _format_name(axis: str, value: str) -> str:
    # a torch dtype, as in Policy(compute=torch.bfloat16); this module does without torch
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        value = str(value).removeprefix("torch.")
    if not isinstance(value, str):
        raise PolicyError(
            f"policy field {axis}={repr(value)[:200]} is no number format; pass a name such as 'bfloat16'"
        )
    try:
        return find_format(value).name
    except (FormatError, AttributeError) as error:
        raise PolicyError(f"policy field {axis}={value!r}: {error}") from None


_MODULE = re.compile(r"[\w*?.#-]+")


def _kept(value: tuple[str, ...] | str) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(n, str) and _MODULE.fullmatch(n) for n in value):
        raise PolicyError(
            f"policy field keep={echoed(value)} is no list of modules; write paths, | between them: "
            "keep=head|blocks.*.norm"
        )
    if len(set(value)) != len(value):
        raise PolicyError(f"policy field keep={'|'.join(value)} names a module twice; leave one out")
    return tuple(value)


def _choice(value: "Update | str") -> Update:
    try:
        return Update(value)
    except ValueError:
        raise PolicyError(f"policy field update={value!r} is unknown; pass {', '.join(Update)}") from None
