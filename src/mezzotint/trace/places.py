"""Which line of a call path to show: the innermost of the user's own program."""

from mezzotint.trace.record import Frame, Site

PACKAGE_FOLDERS = ("/site-packages/", "/dist-packages/")


def is_library(path: str) -> bool:
    """Whether a file belongs to an installed package."""
    return any(folder in path for folder in PACKAGE_FOLDERS)


def user_line(site: Site) -> Frame | None:
    """Return the innermost line of the user's own program; a library's line where there is none."""
    own = (frame for frame in site if not is_library(frame.path))
    return next(own, site[0] if site else None)
