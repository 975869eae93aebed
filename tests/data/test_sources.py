"""Text from files, folders and the standard library; everything that is no text is named."""

import os
import sys
from pathlib import Path

import pytest

from mezzotint.data.sources import read_sources
from mezzotint.errors import DataError


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_standard_library_is_real_text_in_a_fixed_order() -> None:
    first = read_sources(["stdlib"], 300_000)
    assert first == read_sources(["stdlib"], 300_000)
    assert sum(len(text.content) for text in first) == pytest.approx(300_000, abs=3)
    assert all(text.origin.endswith(".py") for text in first)
    assert not any("site-packages" in text.origin or "__pycache__" in text.origin for text in first)


def test_a_cut_keeps_characters_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "ä€𝄞".encode() * 10)
    for limit in range(1, 30):
        (text,) = read_sources([str(path)], limit)
        text.content.decode()
        assert limit - 3 <= len(text.content) <= limit


def test_sources_follow_each_other_and_one_limit_bounds_them_all(tmp_path: Path) -> None:
    names = [str(write(tmp_path / name, name.encode() * 4)) for name in ("b", "a", "c")]
    assert [text.content for text in read_sources(names, 100)] == [b"bbbb", b"aaaa", b"cccc"]
    assert [text.content for text in read_sources(names, 6)] == [b"bbbb", b"aa"]
    assert [text.origin for text in read_sources(names, 8)] == names[:2]


def test_a_folder_is_sorted_and_passes_over_what_is_no_text(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.py", "image.png", ".hidden/d.txt", "empty.txt"):
        content = b"\x89PNG\0" if name.endswith("png") else b"" if name.startswith("empty") else name.encode()
        write(tmp_path / name, content)
    texts = read_sources([str(tmp_path)], 10**6)
    assert [text.content.decode() for text in texts] == ["a.md", "b.txt", "deep/c.py"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"abc\0def", ["binary", "zero byte at offset 3"]),
        (b"ab\xff\xfe", ["binary", "0xff at offset 2"]),
        (b"", ["empty"]),
        (b" \n\t ", ["empty"]),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = write(tmp_path / "data.bin", content)
    with pytest.raises(DataError) as caught:
        read_sources([str(path)], 10**6)
    assert all(word in str(caught.value) for word in [*words, "data.bin"])
    assert "\n" not in str(caught.value)


def test_missing_path_and_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.txt does not exist"):
        read_sources([str(tmp_path / "missing.txt")], 100)
    with pytest.raises(DataError, match="holds no text file"):
        read_sources([str(tmp_path)], 100)


@pytest.mark.parametrize(("name", "words"), [("a" * 300, "too long"), ("a\0b", "null byte")])
def test_a_name_that_no_file_can_have(name: str, words: str) -> None:
    with pytest.raises(DataError, match=f"cannot be read: .*{words}"):
        read_sources([name], 100)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, _pattern: str) -> list[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rglob", refuse)
    with pytest.raises(DataError, match=r"the folder .* cannot be read: Permission denied"):
        read_sources([str(tmp_path)], 100)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", b"text")

    def refuse(_path: Path, _mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        read_sources([str(path)], 100)


def test_a_folder_of_tests_is_read_like_any_other(tmp_path: Path) -> None:
    """Only of the standard library are they left out: a data set may well have a folder named test."""
    for name in ("test/a.txt", "tests/b.txt", "train/c.txt"):
        write(tmp_path / name, name.encode())
    texts = read_sources([str(tmp_path)], 10**6)
    assert [text.content.decode() for text in texts] == ["test/a.txt", "tests/b.txt", "train/c.txt"]


def test_the_standard_library_is_read_without_its_tests() -> None:
    folders = {Path(text.origin).parent.name for text in read_sources(["stdlib"], 10**9)}
    assert "json" in folders
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def test_a_folder_without_text_says_how_many_files_were_no_text(tmp_path: Path) -> None:
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "a.png", b"\x89PNG\0")
    write(tmp_path / "b.png", b"\x89PNG\0")
    with pytest.raises(DataError, match=r"holds no text file \(binary files passed over: 2\)"):
        read_sources([str(tmp_path)], 100)


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_lies_beyond_the_limit_is_not_read(tmp_path: Path, is_folder: bool) -> None:
    """A file larger than any memory, whose rest would not pass for text."""
    path = write(tmp_path / "a.txt", b"0123456789" * 3)
    os.truncate(path, 2**40)
    (text,) = read_sources([str(tmp_path if is_folder else path)], 25)
    assert text.content == b"0123456789012345678901234"


@pytest.mark.parametrize("character", ["a", "ä", "€", "𝄞"])
def test_a_limit_inside_a_character_does_not_make_it_binary(tmp_path: Path, character: str) -> None:
    path = write(tmp_path / "a.txt", (character * 20).encode())
    for limit in range(4, 40):
        (text,) = read_sources([str(path)], limit)
        assert text.content.decode() == character * min(limit // len(character.encode()), 20)


def test_a_file_that_ends_inside_a_character_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text €".encode()[:-1])
    with pytest.raises(DataError, match="0xe2 at offset 5 does not decode"):
        read_sources([str(path)], 100)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_what_is_neither_file_nor_folder(tmp_path: Path) -> None:
    """A pipe could be waited for without end, and read only once; a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), os.devnull):
        with pytest.raises(DataError, match=rf"{path} is neither a file nor a folder; .* into a file"):
            read_sources([path], 100)
    write(tmp_path / "a.txt", b"text")
    assert [text.content for text in read_sources([str(tmp_path)], 100)] == [b"text"]


def test_a_dataset_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:some/set needs a package: pip install 'mezzotint\[data\]'"):
        read_sources(["hf:some/set"], 100)


def test_a_dataset_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):
        column_names = ("text",)

    class Library:
        @staticmethod
        def load_dataset(name: str, split: str) -> Rows:
            assert (name, split) == ("some/set", "train")
            return Rows([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", Library)
    assert [text.content for text in read_sources(["hf:some/set"], 100)] == [b"one\n", b"two\n"]
    monkeypatch.setattr(Library, "load_dataset", lambda name, split: Rows([{"text": None}, {"text": "three"}]))
    assert [text.content for text in read_sources(["hf:some/set"], 100)] == [b"\n", b"three\n"]
    Rows.column_names = ("image",)
    with pytest.raises(DataError, match="no column 'text', only image"):
        read_sources(["hf:some/set"], 100)


@pytest.mark.parametrize(
    ("error", "words"),
    [(ConnectionError("no route\nto host"), "no route$"), (NotImplementedError(), "NotImplementedError$")],
)
def test_a_dataset_that_cannot_be_loaded(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def load_dataset(name: str, split: str) -> None:
            raise error

    monkeypatch.setitem(sys.modules, "datasets", Library)
    with pytest.raises(DataError, match=f"hf:some/set cannot be loaded: {words}"):
        read_sources(["hf:some/set"], 100)
