"""Where in the user's program an operation was called: the lines above it that are neither torch's nor ours.

Walking the stack is done for every operation, so a frame is judged once per code object and its line number is looked
up once per instruction.
"""

import sysconfig
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch

from mezzotint.trace.places import is_library
from mezzotint.trace.record import Frame, Site

_TORCH = str(Path(torch.__file__).parent) + "/"
_ROOMS = ("trace", "auditing", "cli", "rules", "ghost", "plan")
_HOME = Path(__file__).parent.parent
_OURS = (*(f"{_HOME / room}/" for room in _ROOMS), str(_HOME / "patches.py"))
_STDLIB = str(Path(sysconfig.get_paths()["stdlib"])) + "/"

_SKIPPED, _LIBRARY, _USER, _BARRIER = range(4)
NUM_LIBRARY, NUM_USER = 2, 3


class Sites:
    """The lines of the program, each call path kept once."""

    def __init__(self) -> None:
        self._kinds: dict[int, tuple[CodeType, int]] = {}
        self._paths: dict[tuple[tuple[int, int], ...], Site] = {}
        self._barriers: set[int] = set()

    def add_barrier(self, code: CodeType) -> None:
        """Make walks end at this code: what called it is not where the operation comes from."""
        self._kinds[id(code)] = (code, _BARRIER)

    def here(self, frame: FrameType | None) -> Site:
        """Return the user's lines from `frame` outward: at most two of libraries, then at most three of the program."""
        found: list[tuple[int, int]] = []
        kinds = self._kinds
        num_library = num_user = 0
        while frame is not None:
            code = frame.f_code
            known = kinds.get(id(code))
            kind = known[1] if known is not None else self._judge(code)
            if kind == _USER:
                found.append((id(code), frame.f_lasti))
                num_user += 1
                if num_user == NUM_USER:
                    break
            elif kind == _LIBRARY:
                if num_library < NUM_LIBRARY and not num_user:
                    found.append((id(code), frame.f_lasti))
                    num_library += 1
            elif kind == _BARRIER:
                break
            frame = frame.f_back
        key = tuple(found)
        site = self._paths.get(key)
        if site is None:
            site = self._paths[key] = tuple(self._frame(*place) for place in found)
        return site

    def of_error(self, trace: TracebackType | None) -> Site:
        """Return the lines of the program that an exception passed, innermost first, as `here` does."""
        found: list[Frame] = []
        while trace is not None:
            code = trace.tb_frame.f_code
            known = self._kinds.get(id(code))
            kind = known[1] if known is not None else self._judge(code)
            if kind in (_USER, _LIBRARY):
                found.append(Frame(code.co_filename, trace.tb_lineno, code.co_qualname))
            trace = trace.tb_next
        return tuple(reversed(found[-NUM_USER:]))

    def _frame(self, code_id: int, instruction: int) -> Frame:
        code = self._kinds[code_id][0]
        line = next(
            (line for start, end, line in code.co_lines() if start <= instruction < end and line is not None),
            code.co_firstlineno,
        )
        return Frame(code.co_filename, line, code.co_qualname)

    def _judge(self, code: CodeType) -> int:
        path = code.co_filename
        if path.startswith((_TORCH, *_OURS)) or path.startswith("<frozen"):
            kind = _SKIPPED
        elif is_library(path):
            kind = _LIBRARY
        elif path.startswith(_STDLIB):
            kind = _SKIPPED
        else:
            kind = _USER
        self._kinds[id(code)] = (code, kind)  # keeps the code alive, so that its id stays its own
        return kind
