"""What suites are made of: packages from PyPI and npm, sources from Debian, each in a pinned version.

Everything lands below `harness.CACHE`, once; a stamp names what was asked for, so that another version or
another list of packages is fetched anew and nothing else is.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tests.conformance.harness import CACHE, Command, NotRunError, build


def python_environment(name: str, requirements: Sequence[str]) -> Path:
    """Return the Python program of a virtual environment with `requirements` in it."""
    directory = CACHE / name / "venv"
    stamp = directory / "requirements"
    wanted = "\n".join(requirements)
    python = directory / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        build([sys.executable, "-m", "venv", directory], "making a virtual environment")
        pip: Command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        build([*pip, *requirements], f"installing {', '.join(requirements)}")
        stamp.write_text(wanted)
    return python


def python_source(package: str, version: str, *, build_with: Sequence[str]) -> Path:
    """Return the directory of a package's unpacked source distribution.

    pip asks a source distribution for its metadata even where it is only downloaded; `build_with` are the
    packages that this takes, beside setuptools.
    """
    top = CACHE / package
    directory = top / f"{package}-{version}"
    if not directory.exists():
        python = python_environment(f"{package}-download", ["setuptools>=77", "wheel", *build_with])
        pip: Command = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        source_only: Command = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", top]
        build([*pip, *source_only, f"{package}=={version}"], f"downloading the source of {package} {version}")
        unpack(top / f"{package}-{version}.tar.gz", top)
    return directory


def unpack(archive: Path, directory: Path) -> None:
    """Unpack a tar archive of any compression."""
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")


def node_packages(directory: Path) -> Path:
    """Install what `directory`'s package-lock.json names; return where, a copy of `directory`."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise NotRunError("node and npm are not installed")
    target = CACHE / directory.name
    stamp = target / "installed"
    wanted = (directory / "package-lock.json").read_text()
    target.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    if not stamp.exists() or stamp.read_text() != wanted:
        build(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], "npm ci", cwd=target)
        stamp.write_text(wanted)
    return target
