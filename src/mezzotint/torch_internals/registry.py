"""The declarations of private names, and what is said where one is missing.

A feature that cannot work without a name calls `require`, which raises one sentence. A feature that can work with less
adds `notes` to its result, which say what is not known.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from mezzotint.errors import MezzotintError, MissingInternalError

TESTED = ("2.13", "2.14", "2.15")
"""The releases of torch on which the tests run."""

_PACKAGE = "mezzotint.torch_internals"
_NOWHERE = object()


class Feature(StrEnum):
    """What reads private names. RECORDING is what `audit`, `watch`, `assert_policy`, `plan` and `prove` are made of."""

    RECORDING = "recording"
    BISECT = "audit --bisect"
    GHOST = "ghost_gpu"
    FAST_CPU = "fast_cpu"
    ENGINE = "Engine"
    MEMORY = "memory figures"
    PROOF = "prove"


class UntestedTorchWarning(UserWarning):
    """The installed torch is newer than those that mezzotint is tested with."""


class MissingInternalWarning(UserWarning):
    """A check passed, but not all of it could be judged: the installed torch misses a private name."""


@dataclass(frozen=True, slots=True)
class Internal:
    """One private name.

    `needed_by` raise without it. `noted_in` go on, and say `lost` ("clipping could not be watched") and `unknown`
    ("MZ221 is not judged"). Where there are neither, public functions serve and results are the same. `check` tells
    whether the name behaves as expected; without one, it is enough that the name exists.
    """

    path: str
    purpose: str
    needed_by: tuple[Feature, ...] = ()
    noted_in: tuple[Feature, ...] = ()
    lost: str = ""
    unknown: str = ""
    check: Callable[[], bool] | None = None

    def is_available(self) -> bool:
        """Return whether the installed torch has the name and it behaves as expected."""
        if self.check is not None:
            return self.check()
        return exists(self.path)

    def note(self) -> str:
        """Return what a result says where the name is missing."""
        return f"{self.lost} on torch {torch.__version__}: {self.path} is missing, so {self.unknown}"


class Absent:
    """Stands for a name that torch does not have: tables may hold it, and calling it raises MissingInternalError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise MissingInternalError."""
        raise MissingInternalError(_sentence("mezzotint", self._path))

    def __getattr__(self, name: str) -> "Absent":
        """Return what stands for an attribute."""
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._path}.{name}")

    def __repr__(self) -> str:
        return f"<absent {self._path}>"


_declared: dict[str, Internal] = {}
_stand_ins: dict[str, Any] = {}


def find(path: str, default: Any = None) -> Any:
    """Return what a dotted path leads to, `default` where there is no such name. Imports modules on the way."""
    parts = path.split(".")
    found: Any = torch if parts[0] == "torch" else import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        # not `getattr` with a default alone: a submodule may not have been imported
        following = getattr(found, part, _NOWHERE)
        if following is _NOWHERE:
            try:
                following = import_module(".".join(parts[:place]))
            except ImportError:
                return default
        found = following
    return found


def exists(path: str) -> bool:
    """Return whether a dotted path leads to anything."""
    return find(path, _NOWHERE) is not _NOWHERE


def declare(internal: Internal) -> Internal:
    """Add a name to those in use."""
    _declared[internal.path] = internal
    return internal


def value(
    path: str,
    purpose: str,
    *,
    needed_by: tuple[Feature, ...] = (),
    noted_in: tuple[Feature, ...] = (),
    lost: str = "",
    unknown: str = "",
    otherwise: Any = None,
) -> Any:
    """Declare a name and return what torch has there; where it has nothing, `otherwise`, or what raises when called."""
    declare(Internal(path, purpose, needed_by, noted_in, lost, unknown))
    _stand_ins[path] = Absent(path) if otherwise is None else otherwise
    return find(path, _stand_ins[path])


def declared() -> list[Internal]:
    """Return every private name that mezzotint reads, in order."""
    package = import_module(_PACKAGE)
    for module in iter_modules(package.__path__):
        import_module(f"{_PACKAGE}.{module.name}")
    return sorted(_declared.values(), key=lambda one: one.path)


def notes(*features: Feature) -> list[str]:
    """Return what results of these features do not know, because torch misses private names."""
    warn_if_untested()
    return [one.note() for one in _of(features, "noted_in") if not one.is_available()]


def require(feature: Feature, error: type[MezzotintError] = MissingInternalError) -> None:
    """Raise `error` with one sentence if torch misses a name that `feature` cannot work without."""
    warn_if_untested()
    for one in _of((feature,), "needed_by"):
        if not one.is_available():
            raise error(_sentence(feature, one.path))


def _of(features: Iterable[Feature], relation: str) -> list[Internal]:
    wanted = set(features)
    return [one for one in list(_declared.values()) if wanted.intersection(getattr(one, relation))]


def _sentence(what: str, path: str) -> str:
    return f"{what} does not work with torch {torch.__version__}, which has no {path}; install torch {tested_range()}"


def tested_range() -> str:
    """Return the tested releases as text."""
    return f"{TESTED[0]} to {TESTED[-1]}"


_has_warned = False


def warn_if_untested() -> None:
    """Warn once per process if the installed torch is newer than those that are tested."""
    global _has_warned  # noqa: PLW0603  once per process
    if _has_warned:
        return
    if _release(str(torch.__version__)) > _release(TESTED[-1]):
        _has_warned = True
        warnings.warn(
            f"mezzotint is tested with torch {tested_range()}, and this is torch {torch.__version__}; "
            "private names that it misses are named in the notes of results",
            UntestedTorchWarning,
            stacklevel=3,
        )


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
