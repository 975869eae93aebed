"""Text from somewhere, always in the same order: the standard library, files, folders, a Hugging Face dataset."""

import codecs
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mezzotint.data.config import STDLIB
from mezzotint.errors import DataError, shortened

# of the standard library; a folder that the user names is read whole
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"})
LONGEST_CHARACTER = 4  # bytes, in UTF-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One document, UTF-8, and where it came from."""

    origin: str
    content: bytes


def read_sources(sources: Sequence[str], max_bytes: int) -> list[Text]:
    """Return the documents of `sources` in order, cut off after `max_bytes`; what lies beyond is not read.

    Raises DataError, naming the file, for a path that is missing, unreadable or no text, and for sources without text.
    """
    texts: list[Text] = []
    room = max_bytes
    for source in sources:
        for text in _documents(source, room):
            content = text.content[:room]
            # a cut inside a character leaves up to three bytes that no longer decode
            content = content.decode("utf-8", errors="ignore").encode() if len(content) < len(text.content) else content
            texts.append(Text(origin=text.origin, content=content))
            room -= len(content)
            if room <= 0 or len(content) < len(text.content):
                return texts
    if not any(text.content.strip() for text in texts):
        raise DataError(f"the data are empty: {', '.join(sources)} holds no text; pass a file with text in it")
    return texts


def _documents(source: str, room: int) -> Iterator[Text]:
    """Yield the documents of one source, each up to a character beyond `room` bytes, which shows that it goes on."""
    most = room + LONGEST_CHARACTER
    if source == STDLIB:
        yield from _folder(Path(sysconfig.get_paths()["stdlib"]), "*.py", most, SKIPPED_FOLDERS)
    elif source.startswith("hf:"):
        yield from _hugging_face(source.removeprefix("hf:"))
    else:
        path = Path(source)
        if _is_folder(path):
            yield from _folder(path, "*", most, frozenset())
        else:
            yield _file(path, most)


def _file(path: Path, most: int) -> Text:
    if _is_special(path):
        raise DataError(f"{path} is neither a file nor a folder; write its text into a file and pass that")
    content = _read(path, most)
    problem = _why_not_text(content, is_whole=len(content) < most)
    if problem:
        raise DataError(f"{path} is a binary file ({problem}), not UTF-8 text; pass text, or a folder to pick from")
    return Text(origin=str(path), content=content)


def _folder(root: Path, pattern: str, most: int, skipped: frozenset[str]) -> Iterator[Text]:
    """Yield the text files below `root`, sorted by path; binary files and hidden folders are passed over."""
    num_texts = num_binary = 0
    for path in _listed(root, pattern):
        inner = path.relative_to(root).parts
        if any(part in skipped or part.startswith(".") for part in inner) or not path.is_file():
            continue
        content = _read(path, most)
        if _why_not_text(content, is_whole=len(content) < most):
            num_binary += 1
        elif content:
            num_texts += 1
            yield Text(origin=str(path), content=content)
    if num_texts == 0:
        passed = f" (binary files passed over: {num_binary})" if num_binary else ""
        raise DataError(f"the folder {root} holds no text file{passed}; pass one with UTF-8 text in it")


def _hugging_face(name: str) -> Iterator[Text]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf:{name} needs a package: pip install 'mezzotint[data]'") from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises dozens of kinds, and each means that there are no data
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the dataset hf:{name} cannot be loaded: {reason}") from None
    if "text" not in rows.column_names:
        raise DataError(f"the dataset hf:{name} has no column 'text', only {', '.join(rows.column_names)}")
    for index, row in enumerate(rows):
        yield Text(origin=f"hf:{name}[{index}]", content=((row["text"] or "") + "\n").encode())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long, a parent that cannot be searched: reading it says so
        return False


def _is_special(path: Path) -> bool:
    """Return whether the path is a pipe, a device or a socket."""
    try:
        return path.exists() and not path.is_file()
    except (OSError, ValueError):  # reading it says so
        return False


def _listed(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(root.rglob(pattern))
    except OSError as error:
        raise DataError(f"the folder {root} cannot be read: {error.strerror or error}") from None


def _read(path: Path, most: int) -> bytes:
    """Return the first `most` bytes of a file, or all of it."""
    try:
        with path.open("rb") as file:
            # no more than there is: reading reserves the memory that it is told
            return file.read(min(most, os.fstat(file.fileno()).st_size + LONGEST_CHARACTER))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; pass a file or folder of text") from None
    except OSError as error:
        raise DataError(f"{shortened(path)} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a zero byte in the name
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None


def _why_not_text(content: bytes, *, is_whole: bool) -> str | None:
    """Return what shows that `content` is not text, with its byte offset, or None.

    Where it is not the whole file, a character may be incomplete at the end.
    """
    zero = content.find(b"\0")
    if zero >= 0:
        return f"a zero byte at offset {zero}"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content, final=is_whole)
    except UnicodeDecodeError as error:
        return f"byte 0x{content[error.start]:02x} at offset {error.start} does not decode"
    return None
