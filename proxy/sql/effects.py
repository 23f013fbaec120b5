"""What the statements of a text do to the session: transactions, settings, prepared statements, replies.

Works on the parsed statements one by one.  Where something cannot be known (a ``set_config`` whose name is
computed, the replies of a CALL) the answer is the careful one.

Replies follow the PostgreSQL documentation, "Message Flow" (54.2.2, simple query): a statement that can
return rows sends RowDescription before its CommandComplete, even for no rows and no columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from postgast import pg_query_pb2 as pb

from proxy.sql.statements import ANY_SETTING, TransactionVerb
from proxy.sql.tree import Message, inner, names, walk, without_casts

_VERBS: Final = {
    pb.TRANS_STMT_BEGIN: TransactionVerb.BEGIN,
    pb.TRANS_STMT_START: TransactionVerb.BEGIN,
    pb.TRANS_STMT_COMMIT: TransactionVerb.COMMIT,
    pb.TRANS_STMT_ROLLBACK: TransactionVerb.ROLLBACK,
    pb.TRANS_STMT_SAVEPOINT: TransactionVerb.SAVEPOINT,
    pb.TRANS_STMT_RELEASE: TransactionVerb.RELEASE,
    pb.TRANS_STMT_ROLLBACK_TO: TransactionVerb.ROLLBACK_TO,
}

_COMPLETIONS: Final = {
    "alter_table_stmt": 1,
    "close_portal_stmt": 1,
    "comment_stmt": 1,
    "create_stmt": 1,
    "create_table_as_stmt": 1,
    "deallocate_stmt": 1,
    "declare_cursor_stmt": 1,
    "discard_stmt": 1,
    "drop_stmt": 1,
    "explain_stmt": 2,
    "index_stmt": 1,
    "listen_stmt": 1,
    "lock_stmt": 1,
    "notify_stmt": 1,
    "prepare_stmt": 1,
    "transaction_stmt": 1,
    "truncate_stmt": 1,
    "unlisten_stmt": 1,
    "variable_set_stmt": 1,
    "variable_show_stmt": 2,
}


@dataclass(slots=True)
class Effects:
    """The effects of all statements of a text together."""

    controls_transaction: bool = False
    transaction: TransactionVerb | None = None  # of the last transaction-control statement
    touches: set[str] = field(default_factory=set)
    local: set[str] = field(default_factory=set)
    lasting: set[str] = field(default_factory=set)
    resets: set[str] = field(default_factory=set)
    drops_prepared: bool = False


def effects_of(statements: Sequence[pb.RawStmt], *, look_for_set_config: bool) -> Effects:
    """Return what the statements do, in sum; `look_for_set_config` walks the whole trees."""
    effects = Effects()
    for statement in statements:
        node = inner(statement.stmt)
        if isinstance(node, pb.TransactionStmt):
            effects.controls_transaction = True
            effects.transaction = _verb(node)
        elif isinstance(node, pb.CallStmt | pb.DoStmt):
            effects.controls_transaction = True  # its body may commit
        elif isinstance(node, pb.VariableSetStmt):
            _add_setting(effects, node)
        elif isinstance(node, pb.DiscardStmt) and node.target == pb.DISCARD_ALL:
            effects.resets.add(ANY_SETTING)
            effects.drops_prepared = True
        elif isinstance(node, pb.DeallocateStmt) and not node.name:
            effects.drops_prepared = True
        if look_for_set_config:
            found = _set_config_names(node)
            effects.touches |= found
            effects.lasting |= found  # whether its third argument is true is not looked at
    return effects


def completions(statement: pb.RawStmt) -> int | None:
    """Return how many RowDescription and CommandComplete messages a statement sends in the simple protocol.

    None where it depends on more than the text: COPY, CALL, EXECUTE, changes of data (a rule may add a
    SELECT to them), and whatever is not listed.
    """
    kind = statement.stmt.WhichOneof("node")
    node = inner(statement.stmt)
    if isinstance(node, pb.SelectStmt):
        return 1 if _leftmost(node).HasField("into_clause") else 2
    if isinstance(node, pb.FetchStmt):
        return 1 if node.ismove else 2
    return _COMPLETIONS.get(kind or "")


def _leftmost(select: pb.SelectStmt) -> pb.SelectStmt:
    """Return the arm of a set operation that carries INTO."""
    while select.HasField("larg"):
        select = select.larg
    return select


def _verb(node: pb.TransactionStmt) -> TransactionVerb:
    if node.chain:
        return TransactionVerb.OTHER
    return _VERBS.get(node.kind, TransactionVerb.OTHER)


def _add_setting(effects: Effects, node: pb.VariableSetStmt) -> None:
    if node.kind == pb.VAR_RESET_ALL:
        effects.resets.add(ANY_SETTING)
    elif node.kind in (pb.VAR_RESET, pb.VAR_SET_DEFAULT):
        effects.resets.add(node.name.lower())
    elif node.kind == pb.VAR_SET_MULTI:  # SET TRANSACTION, SET SESSION CHARACTERISTICS
        effects.touches.update(item.def_elem.defname for item in node.args if item.HasField("def_elem"))
    else:
        name = node.name.lower()
        effects.touches.add(name)
        (effects.local if node.is_local else effects.lasting).add(name)


def _set_config_names(tree: Message) -> set[str]:
    """Return the names of the settings that calls of ``set_config`` change."""
    found: set[str] = set()
    for node in walk(tree):
        if not isinstance(node, pb.FuncCall) or names(node.funcname)[-1:] != ["set_config"]:
            continue
        first = without_casts(node.args[0]) if node.args else pb.Node()
        if first.a_const.HasField("sval"):
            found.add(first.a_const.sval.sval.lower())
        else:
            found.add(ANY_SETTING)
    return found
