"""The users file: one line for each user, in the format of pgbouncer's userlist.txt.

::

    ; a comment
    "application" "SCRAM-SHA-256$4096:salt$StoredKey:ServerKey"
    "other"       "a password in plain text"

Both are in quotation marks, in which a quotation mark is written twice; what follows them on a line is
ignored.  A verifier is as PostgreSQL stores it (pg_authid.rolpassword).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from proxy.auth.verifier import Verifier

MAX_BYTES: Final = 64 << 20
"""A larger file is refused: it is something else."""

MAX_PROBLEMS: Final = 20
"""Problems reported of one file."""

_LINE: Final = re.compile(r'\s*"((?:[^"]|"")*)"\s+"((?:[^"]|"")*)"(?:\s.*)?', re.DOTALL)
_MD5: Final = re.compile(r"md5[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class User:
    """What is known of a user: a verifier or a password (bytes in UTF-8)."""

    verifier: Verifier | None = None
    password: bytes | None = field(default=None, repr=False)


class UsersFileError(Exception):
    """The file cannot be used; `problems` name lines, and nothing secret."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def parse(text: str) -> dict[bytes, User]:
    """Return the users by name.

    Raises
    ------
    UsersFileError
        A line is malformed, or holds what SCRAM cannot work with.
    """
    users: dict[bytes, User] = {}
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith((";", "#")):
            continue
        try:
            name, user = _entry(line)
            if name in users:
                raise ValueError("the user is there twice; keep one line")
            users[name] = user
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            if len(problems) == MAX_PROBLEMS:
                break
    if problems:
        raise UsersFileError(problems)
    return users


def _entry(line: str) -> tuple[bytes, User]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise ValueError('should be "user" "verifier or password", both in quotation marks')
    name, secret = (part.replace('""', '"') for part in found.groups())
    if not name:
        raise ValueError("the user's name is empty")
    if not secret:
        raise ValueError("the password is empty; leave the user out")
    if _MD5.fullmatch(secret):
        raise ValueError(
            "an md5 hash cannot be used for SCRAM; put the SCRAM-SHA-256 verifier there: SET "
            "password_encryption "
            "= 'scram-sha-256', set the user's password anew, then read rolpassword from pg_authid"
        )
    if secret.startswith("SCRAM-"):
        return name.encode(), User(verifier=Verifier.parse(secret))
    return name.encode(), User(password=secret.encode())
