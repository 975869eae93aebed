"""Text to Policy. The way back is `str(policy)`.

policy  = preset | field ("," field)* | preset "," field ("," field)*
field   = name "=" value
scaling = "none" | "static(" number ")" | "dynamic" | "dynamic(" setting ("," setting)* ")"
products = "none" | format | format "(" setting ("," setting)* ")"
keep    = "none" | module ("|" module)*
"""

import re
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from mezzotint.errors import FormatError, PolicyError, shortened
from mezzotint.formats.inputs import InputRounding
from mezzotint.policy.policy import POLICY_FIELDS, Policy
from mezzotint.policy.presets import ALIASES, FOREIGN, PRESETS
from mezzotint.policy.scaling import Scaling, ScalingKind

_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^(]*\))")


def parse_policy(text: str | Policy) -> Policy:
    """Return the policy that `text` names ("bf16-mixed"), spells, or names and changes ("bf16-mixed, loss=bf16").

    Fields not given are those of the float32 policy. `tests/policy` hold the law parse(str(p)) == p.
    Raises PolicyError, naming the unknown word and the nearest known one.
    """
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str):
        raise PolicyError(f"a policy is a text or a Policy, not {text!r}; pass for example 'bf16-mixed'")
    preset: dict[str, Any] = {}
    given: list[str] = []
    for position, item in enumerate(_items(text)):
        if position == 0 and "=" not in item:
            preset = _fields(_items(_preset(item)))
        else:
            given.append(item)
    return Policy(**{**preset, **_fields(given)})


def _items(text: str) -> list[str]:
    items = [item.strip() for item in _COMMA_OUTSIDE_PARENTHESES.split(text)]
    if not all(items):
        raise PolicyError(f"policy {text!r} has an empty part; write name=value, name=value, or a preset name")
    return items


def _preset(name: str) -> str:
    lower = name.lower()
    found = PRESETS.get(ALIASES.get(lower, lower))
    if found is None:
        near = (
            [FOREIGN[lower]]
            if lower in FOREIGN
            else get_close_matches(lower, [preset for preset in PRESETS if preset != "bf16-pure"], n=2, cutoff=0.4)
            or list(PRESETS)
        )
        raise PolicyError(f"unknown policy {shortened(repr(name))}; did you mean {' or '.join(near)}?")
    return found


def _fields(items: list[str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for item in items:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or name not in POLICY_FIELDS:
            raise PolicyError(
                f"unknown policy field {shortened(repr(item))}; the fields are {', '.join(POLICY_FIELDS)}"
            )
        if name in chosen:
            raise PolicyError(f"policy field {name} is given twice, as {chosen[name]} and as {value}; leave one out")
        chosen[name] = _PARSERS[name](value) if name in _PARSERS else value
    return chosen


def parse_scaling(text: str) -> Scaling:
    """Return the Scaling that `text` spells: `none`, `static(1024)`, `dynamic`, `dynamic(initial=1024, floor=0.5)`.

    Raises PolicyError.
    """
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text.strip())
    if match is None or match[1] not in set(ScalingKind):
        raise PolicyError(f"unknown scaling {text!r}; write none, static(1024) or dynamic")
    kind, inside = ScalingKind(match[1]), match[2] or ""
    settings: dict[str, Any] = {}
    known = {f.name: f.type for f in fields(Scaling) if f.name != "kind"}
    for position, item in enumerate(filter(None, (part.strip() for part in inside.split(",")))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if position == 0 and not equals and kind is ScalingKind.STATIC:
            name, value = "initial", name
        if name in settings:
            raise PolicyError(f"scaling setting {name} is given twice; leave one out")
        if name not in known or not value:
            raise PolicyError(f"unknown scaling setting {item!r}; the settings are {', '.join(known)}")
        try:
            settings[name] = int(value) if known[name] in (int, "int") else float(value)
        except ValueError:
            raise PolicyError(
                f"scaling setting {name}={shortened(repr(value))} is not a number; write for example floor=0.5"
            ) from None
    if kind is ScalingKind.STATIC and "initial" not in settings:
        raise PolicyError("scaling=static needs its scale; write static(1024)")
    return Scaling(kind=kind, **settings)


def parse_products(text: str) -> InputRounding | None:
    """Return what `text` spells: `none`, `mxfp8`, `e4m3(gradients=e5m2, scale=tensor, history=16)`.

    Raises PolicyError.
    """
    match = re.fullmatch(r"([\w-]+)\s*(?:\((.*)\))?", text.strip())
    if match is None:
        raise PolicyError(f"unknown products {text!r}; write none, mxfp8 or e4m3(scale=tensor)")
    if match[1] == "none" and match[2] is None:
        return None
    settings: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in _PRODUCT_SETTINGS or not value:
            raise PolicyError(f"unknown setting {item!r} of products; the settings are {', '.join(_PRODUCT_SETTINGS)}")
        if name in settings:
            raise PolicyError(f"setting {name} of products is given twice; leave one out")
        settings[name] = value
    try:
        return InputRounding(
            inputs=match[1],
            gradients=settings.get("gradients", ""),
            scale=settings.get("scale", "none"),
            history=_whole(settings.get("history", "0")),
            is_stochastic=_truth(settings.get("stochastic", "false")),
        )
    except FormatError as error:
        raise PolicyError(f"products={text}: {error}") from None


_PRODUCT_SETTINGS = ("gradients", "scale", "history", "stochastic")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise PolicyError(
            f"history={shortened(repr(text))} of products is no whole number; write for example history=16"
        )
    return int(text)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise PolicyError(f"stochastic={text!r} of products is refused; write true or false")
    return text == "true"


def parse_keep(text: str) -> tuple[str, ...]:
    """Return the modules that `text` lists: `none`, or paths with | between them."""
    return () if text == "none" else tuple(part.strip() for part in text.split("|"))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "scaling": parse_scaling,
    "products": parse_products,
    "keep": parse_keep,
}
