"""What all fuzz targets share: how they run in CI, hostile texts, numbers and bytes, and a command run in this process.

Each target is a test over drawn examples. In CI the examples are few and always the same; `make fuzz` (campaign.py)
draws new ones for as long as it is told to.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from mezzotint.cli import main as command_line

IS_CAMPAIGN = "MEZZOTINT_FUZZ" in os.environ  # set by campaign.py
BATCH = 25  # examples of a campaign between two looks at the clock
LONG = "Ж"  # no message of ours holds it, so that what a message echoes can be counted
MOST_ECHOED = 2 * 200  # 200 of a value, which may be told with its reason


def examples(number: int) -> settings:
    """Return how a target runs: in CI so many examples, always the same; in a campaign new ones, batch by batch."""
    return settings(
        max_examples=BATCH if IS_CAMPAIGN else number,
        derandomize=not IS_CAMPAIGN,
        database=None,
        deadline=None,  # a machine shared with other programs makes any single example slow
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink)[: 1 if "FUZZ_NO_SHRINK" in os.environ else 2],
    )


HUGE = (1e9, 1e12, 2**31, 2**63, 2**64, 10**400)
NONFINITE = ("nan", "inf", "-inf", "1e999", "-0.0", "1e-999")


def numbers() -> st.SearchStrategy[str]:
    """Texts that are numbers, or nearly."""
    return st.one_of(
        st.sampled_from(NONFINITE),
        st.sampled_from([str(number) for number in HUGE]),
        st.integers(-3, 64).map(str),
        st.floats().map(repr),
        st.sampled_from(["0x10", "1_000", "1e3", "١", "1,5", "0b1", "--1", "+-1", "1e", "." * 3]),
    )


def texts() -> st.SearchStrategy[str]:
    """Texts that no command expects: empty, long, of all scripts, of control characters, of other languages' syntax."""
    return st.one_of(
        st.sampled_from(["", " ", "\t", "\n", "-", "--", "..", "/", "~", "*", "%s", "{}", "$HOME", "[b]", "null"]),
        st.sampled_from(["[]", "{}", '"', "'''", "=", "a=b", "a.b=c", "../../etc", "[/]", "\\", "\x1b[31m", "\udc80"]),
        st.integers(201, 5000).map(lambda length: LONG * length),
        st.text(max_size=20).filter(lambda text: "\0" not in text),  # no system passes a zero byte in an argument
    )


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return `content` with a bit flipped, cut short, a part doubled or removed, or something else in its place."""
    places = st.integers(0, max(len(content) - 1, 0))

    def flip(place: int, bit: int) -> bytes:
        return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :] if content else b""

    return st.one_of(
        st.builds(flip, places, st.integers(0, 7)),
        places.map(lambda end: content[:end]),
        st.builds(lambda a, b: content[: max(a, b)] + content[min(a, b) :], places, places),
        st.builds(lambda a, b: content[: min(a, b)] + content[max(a, b) :], places, places),
        st.binary(max_size=64),
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, and what it wrote; `begun` where it got as far as its work."""

    code: int | None
    out: str
    err: str
    begun: bool = False


class WorkBegins(BaseException):
    """Raised in the place of a command's work, where only what stands before it is tried."""


# what takes long once the options were understood
WORK = (
    "mezzotint.auditing.script.run_target",
    "mezzotint.auditing.planning.plan_target",
    "mezzotint.auditing.planning.audit_on_ghost",
    "mezzotint.cli.bisect.find_islands",
    "mezzotint.cli.bench._run",
    "mezzotint.cli.doctor.diagnose",
    "mezzotint.cli.train._run",
    "mezzotint.cli.prove.carry_out",
    "mezzotint.cli.demo.carry_out",
    "mezzotint.claims.evaluate.outcome_of",
    "mezzotint.cli.policy._ask",
)


@contextlib.contextmanager
def work_begins() -> Iterator[None]:
    """Stop every command where its work would begin."""
    with contextlib.ExitStack() as stack:
        for name in WORK:
            stack.enter_context(mock.patch(name, side_effect=WorkBegins))
        yield


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """Work in an empty folder, which goes away afterwards."""
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="mezzotint-fuzz-"))
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files under `folder`, and folders as their names with a slash."""
    return {
        str(path.relative_to(folder)) + ("/" if path.is_dir() else ""): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def run(*arguments: str) -> Ended:
    """Run a command in this process, as the console script does, and return how it ended.

    Any exception but the ones that end a process is a fault, and is raised.
    """
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"), io.StringIO()
    code: int | None = 0
    begun = False
    with (
        mock.patch.object(sys, "argv", ["mezzotint", *arguments]),
        mock.patch.object(sys, "stdout", out),
        mock.patch.object(sys, "stderr", err),
        # after a script, a command ends its process, which is this one
        mock.patch.object(command_line, "has_run_script", return_value=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            command_line.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except WorkBegins:
            code, begun = None, True
    out.flush()
    return Ended(code, out.buffer.getvalue().decode("utf-8"), err.getvalue(), begun)  # type: ignore[attr-defined]


def check(ended: Ended, arguments: tuple[str, ...]) -> None:
    """Check what holds for every command: a known exit code, words, one JSON object, no traceback, short echoes."""
    told = f"{ended}\nof mezzotint {' '.join(repr(one[:300]) for one in arguments)}"
    assert "Traceback" not in ended.out + ended.err, told
    assert ended.err.count(LONG) <= MOST_ECHOED, f"echoes {ended.err.count(LONG)} characters: {told[:3000]}"
    if ended.begun:
        return
    assert ended.code in (0, 1, 2, 3), told
    if ended.code == 2:
        assert ended.err.strip(), told
    if ended.code == 0:
        assert ended.out.strip(), told
    is_help = {"-h", "--help", "--version"} & set(arguments)
    if "--json" in arguments and ended.out.strip() and not is_help:
        assert json.loads(ended.out)["schema"].startswith("mezzotint."), told


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a forked process, or raise what it raises; a crash is an AssertionError here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        with open(writer, "wb") as pipe:  # noqa: PTH123 - a descriptor
            try:
                answer = (True, work())
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.write(pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123 - a descriptor
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    assert content, f"the process died of signal {os.WTERMSIG(status)}"
    is_good, answer = pickle.loads(content)
    assert is_good, answer
    return answer
