"""Recognition of vector queries in SQL text: pure, no sockets, no database.

`Recogniser.recognise` tells a session what one SQL text means for it; `proxy.sql.vectors` decodes arguments.
"""

from proxy.sql.recogniser import Recogniser
from proxy.sql.statements import (
    ANY_SETTING,
    UNKNOWN,
    Argument,
    Scope,
    Statement,
    TransactionVerb,
    VectorQuery,
)

__all__ = [
    "ANY_SETTING",
    "UNKNOWN",
    "Argument",
    "Recogniser",
    "Scope",
    "Statement",
    "TransactionVerb",
    "VectorQuery",
]
