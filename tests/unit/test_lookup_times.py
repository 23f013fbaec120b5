"""What a worker tells the learner of a query: among others what choosing its settings took."""

from __future__ import annotations

import msgspec
import numpy as np

from learning.distillation import Options, distill
from learning.optimizer import SearchOptimizer
from learning.records import Snapshot, TemplatePolicy, Trajectory, Trust
from proxy.session.adaptation import Adapter, Execution, Outcome
from proxy.session.counters import Counters
from proxy.sql import Scope
from tests.unit.learning_labels import ARMS, facts, mixed_labels, queries, table_rows, template

SQL = b"SELECT id FROM items ORDER BY embedding <=> $1 LIMIT 10"


def learned() -> TemplatePolicy:
    options = Options(lookup_ms=0.0, sketch_ms=-10.0)
    labels = mixed_labels(600, 0)
    return distill(template(), facts(sketch=table_rows(2000, 1)), ARMS, labels, {"10": 1}, options)


def served(policy: TemplatePolicy, vector: bytes) -> Trajectory:
    """Return what is recorded of one query with this vector (float32, little endian) under a policy."""
    adapter = Adapter(Counters())
    query = adapter.recognise(SQL, Scope("d", "u", None)).vector
    assert query is not None
    key = query.template.key
    policy = msgspec.structs.replace(policy, template=key)
    adapter.swap(SearchOptimizer(Snapshot(1, 0.0, {key: policy})), 1)
    executions: list[Execution] = []
    adapter.record = executions.append
    numbers = np.frombuffer(vector, dtype="<f4")
    sent = len(numbers).to_bytes(2, "big") + b"\0\0" + numbers.astype(">f4").tobytes()
    adapter.finished(adapter.bind(query, [(1, sent)]), Outcome(10, 0.001, 0.002, None))
    (execution,) = executions
    trajectory: Trajectory = execution.trajectory()
    assert trajectory.vector == vector
    return trajectory


def test_the_time_of_a_lookup_is_told() -> None:
    trajectory = served(learned(), queries(1, 99)[0][0].tobytes())
    assert trajectory.trust is Trust.QUERY
    assert trajectory.lookup_ms is not None
    assert trajectory.lookup_ms > 0.0


def test_what_is_known_by_heart_or_the_same_for_all_took_no_lookup() -> None:
    policy, vector = learned(), mixed_labels(600, 0)[-1].vector
    assert vector is not None
    by_heart = served(policy, vector)
    assert by_heart.trust is Trust.QUERY
    assert by_heart.lookup_ms is None
    one_for_all = served(msgspec.structs.replace(policy, query=None, trust=Trust.STATIC), vector)
    assert one_for_all.trust is Trust.STATIC
    assert one_for_all.lookup_ms is None
