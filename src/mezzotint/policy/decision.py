"""Decision: a choice made for the user, never without its reasons."""

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Decision(Generic[T]):
    """A chosen value and why; `reasons` are sentences, the decisive one first."""

    value: T
    reasons: tuple[str, ...]
