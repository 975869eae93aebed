"""The version of this package, from its installed metadata."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Return the installed version, or "unknown" when the sources run without being installed."""
    try:
        return version("mezzotint")
    except PackageNotFoundError:
        return "unknown"
