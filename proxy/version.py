"""The version of the installed distribution."""

from importlib import metadata


def version() -> str:
    """Return the version, or "unreleased" where the source tree runs without being installed."""
    try:
        return metadata.version("ruvector-proxy")
    except metadata.PackageNotFoundError:
        return "unreleased"
