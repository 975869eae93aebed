"""Files: written whole or not at all, and read only where they are regular files."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, flush it to the disk, and rename it, so that no reader sees half of it.

    The folder must exist. Raises OSError, with the file as it was before.
    """
    data = content.encode() if isinstance(content, str) else content
    # a short name of its own, since the name of the file may be as long as the file system takes
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(_mode_of(path))
        Path(partial).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(partial).unlink()
        raise
    sync_folder(path.parent)


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file, or of what a link to one holds.

    Raises OSError. A pipe, device, socket or folder is refused and not read, which for a pipe would wait for a writer.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a pipe waits
            raise OSError("it is not a regular file")
        return path.read_bytes()
    except ValueError as error:  # a zero byte in the name
        raise OSError(str(error)) from None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut; systems that cannot open folders do it by themselves."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of(path: Path) -> int:
    """Return the permissions of the file that is replaced; for a new one what other programs give it."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return 0o644
