"""Every error that mezzotint raises on purpose.

    MezzotintError
    +-- UserError (also a ValueError)      the request cannot be granted; the command line exits with 2
    |   +-- FormatError                    an unknown number format, or a value that is not a number
    |   +-- PolicyError                    a policy that contradicts itself, or that this device cannot run
    |   +-- ConfigError                    a recipe, a setting, an output folder
    |   +-- DataError                      training text that is missing, too short, or not text
    |   +-- CheckpointError                a checkpoint that is damaged or belongs to another run
    |   +-- EngineError                    calls of the engine in an order that has no meaning
    |   +-- AuditError                     a script or an audit that cannot be started
    |   +-- GhostError                     what the simulated GPU cannot do
    |   +-- PlanError                      a card or a run that cannot be planned
    |   +-- ProofError                     a comparison that cannot be run, or goes on with another design
    +-- TrainingError (also a RuntimeError)   a run that cannot go on
        +-- NonFiniteError                 NaN or infinity in loss or gradients, beyond what skipping repairs
    +-- MissingInternalError               the installed torch has no private name that a feature cannot work without

A message names the value, the limit and the fix, in one sentence where that is possible.
"""

import re
import sys
import traceback
from pathlib import Path

_MAX_MESSAGE = 2000
_OURS = str(Path(__file__).parent) + "/"
STANDARD_LIBRARY = str(Path(traceback.__file__).parent) + "/"


class MezzotintError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user, without a traceback.

    Of a value in the text at most 200 characters are kept.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_bounded(one) if isinstance(one, str) else one for one in args))


class UserError(MezzotintError, ValueError):
    """The request cannot be granted as it was made."""


class FormatError(UserError):
    """A number format or a number that is not known."""


class PolicyError(UserError):
    """A precision policy that contradicts itself or that the device cannot run."""


class ConfigError(UserError):
    """A recipe, setting or folder that cannot be used."""


class DataError(UserError):
    """Training text that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete or of another run."""


class EngineError(UserError):
    """Calls of the engine in an order that has no meaning."""


class AuditError(UserError):
    """A script that cannot be run, or an audit inside another."""


class GhostError(UserError):
    """Something that a simulated GPU cannot do, or a torch that it cannot stand in for."""


class PlanError(UserError):
    """A card, a format or a run that cannot be planned."""


class ProofError(UserError):
    """A comparison that cannot be run as it was asked for, or a folder that holds another one."""


class TrainingError(MezzotintError, RuntimeError):
    """A training run that cannot go on."""


class MissingInternalError(MezzotintError):
    """The installed torch has no private name that a feature cannot work without."""


class NonFiniteError(TrainingError):
    """NaN or infinity where the run needs finite numbers, beyond what skipping a step repairs.

    `tensors` names the offending parameters or the loss, in the order of the model.
    """

    def __init__(self, message: str, *, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors


def shortened(value: object, limit: int = 200) -> str:
    """Return a value for a message: one line of at most `limit` characters, and how many there were."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python spells
        return "a number of more than 4,000 digits"
    text = text if text.isprintable() else repr(text)
    if len(text) <= limit:
        return text
    end = f"... ({len(text):,} characters)"
    return text[: limit - len(end)] + end


def is_machinery(filename: str) -> bool:
    """Whether a frame's file is PyTorch's, this package's, or none (frozen modules, compiled strings)."""
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    return filename.startswith((_OURS, "<")) or (
        torch is not None and filename.startswith(str(torch).rpartition("/")[0] + "/")
    )


def _bounded(text: str) -> str:
    """Return a message with its long words cut to 200 characters, and not longer than 2,000 in all."""
    text = re.sub(r"\S{201,}", lambda found: shortened(found[0]), text)
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."


def echoed(value: object, limit: int = 200) -> str:
    """Return a value as Python writes it, for a message: one line of at most `limit` characters."""
    try:
        return shortened(repr(value), limit)
    except ValueError:  # an integer of more digits than Python spells
        return shortened(value, limit)


def is_count(value: object) -> bool:
    """Return whether a value is a whole number of 1 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def place_of(error: BaseException) -> str | None:
    """Return the line of the user's program that an error came from, a library's where no line of the user's is in it.

    None where there are only lines of PyTorch, of Python's own library and of this package.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not is_machinery(frame.filename)
        and ("-packages/" in frame.filename or not frame.filename.startswith(STANDARD_LIBRARY))
    ]
    own = [frame for frame in frames if "-packages/" not in frame.filename]
    found = (own or frames)[-1] if frames else None
    return f"{found.filename}:{found.lineno}" if found is not None else None


def described(error: BaseException) -> str:
    """Return an error in a line, with the line of the user's program that it came from."""
    place = place_of(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + text[0] if text else ''}{f' at {place}' if place else ''}"
