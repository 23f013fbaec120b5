"""The learner's metrics, for /metrics of the supervisor.

In production ``PROMETHEUS_MULTIPROC_DIR`` is set before this module is imported: values then live in files
that the supervisor merges, and gauges take the value of the process that wrote last, as there is one learner
at a time.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from learning.records import Trust


class LearnerMetrics:
    """All series of the learner.

    Parameters
    ----------
    registry
        Where to register; None registers nowhere, which is right in multiprocess mode, and for several
        learners in one process.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.audited_recall = gauge(
            "ruvector_audited_recall_ratio",
            "Mean recall of recent queries as served, from a uniform sample measured against exact search.",
            ["table"],
        )
        self.audited_queries = gauge(
            "ruvector_audited_queries", "Number of queries behind ruvector_audited_recall_ratio.", ["table"]
        )
        self.drifts = counter(
            "ruvector_drifts_total",
            "Changes after which a template was learned anew: index, rows, mix (other queries), recall.",
            ["table", "kind"],
        )
        self.on_trial = gauge(
            "ruvector_canary_templates",
            "Templates whose new policy is on trial: part of their queries get it.",
            ["table"],
        )
        self.trials = counter(
            "ruvector_canaries_total",
            "Trials of new policies that are over, by outcome: promoted, rolled back: recall, rolled back: "
            "latency, overtaken (by a change that leaves nothing to compare).",
            ["table", "outcome"],
        )
        self.holding = gauge(
            "ruvector_drift_holding",
            "Templates served with a safe setting until they are measured anew.",
            ["table"],
        )
        self.recovery = gauge(
            "ruvector_drift_recovery_seconds",
            "Time from noticing the last change to the first policy from new measurements.",
            ["table"],
        )
        self.rated = counter(
            "ruvector_feedback_total",
            "Queries whose results a user rated: good, missed (relevant rows that the index did not find), "
            "unknown (the query is not remembered), failed.",
            ["table", "outcome"],
        )
        self.target = gauge(
            "ruvector_target_recall_ratio",
            "Recall that is aimed at: the configured target, or more where users reported missed rows.",
            ["table"],
        )
        self.labels = counter("ruvector_labels_total", "Queries measured against exact search.", ["table"])
        self.label_errors = counter("ruvector_label_errors_total", "Measurements that failed.", ["table"])
        self.probe_seconds = counter(
            "ruvector_probe_seconds_total", "Database time spent on measuring, in seconds."
        )
        self.credit = gauge(
            "ruvector_probe_credit_seconds", "Database time that may be spent on measuring now."
        )
        self.pace = gauge(
            "ruvector_probe_pace_ratio",
            "Rest after a measurement, in multiples of its duration; above 0: busy server.",
        )
        self.templates = gauge("ruvector_templates", "Known vector query templates, by trust.", ["trust"])
        self.trusted = gauge(
            "ruvector_table_templates",
            "Vector query templates of each table, by how far the product goes for them: observe (as they "
            "came), static (one arm), context (by filter value), query (by query vector).",
            ["table", "trust"],
        )
        self.verdicts = counter(
            "ruvector_verdicts_total",
            "Measured queries by verdict: success, failure.",
            ["table", "verdict"],
        )
        self.recommendations = counter(
            "ruvector_recommendations_total",
            "Measured queries for which something was recommended, by what.",
            ["table", "recommendation"],
        )
        self.templates_refused = counter(
            "ruvector_templates_refused_total", "Templates not learned about because there are too many."
        )
        self.lag = gauge(
            "ruvector_learner_lag_seconds",
            "Time between the last processed query and its processing, in seconds.",
        )
        self.trajectories = counter(
            "ruvector_trajectories_received_total", "Recorded queries that reached the learner."
        )
        self.dropped = counter(
            "ruvector_trajectories_dropped_total",
            "Recorded queries not used: lost in the worker's queue, or of an unknown template.",
            ["reason"],
        )
        self.version = gauge("ruvector_learner_policy_version", "Version of the policy published last.")
        self.published = counter("ruvector_policies_published_total", "Policies published.")
        self.distill_seconds = counter(
            "ruvector_distill_seconds_total", "Time spent on deriving policies, in seconds."
        )
        self.injection_failures = counter(
            "ruvector_injection_failures_total",
            "Templates switched off because the server refused a setting.",
        )
        self.store_up = gauge(
            "ruvector_shared_store_up", "Whether the shared store could be used last (1) or not (0)."
        )
        self.leading = gauge(
            "ruvector_replica_leading",
            "Whether this replica measures and publishes for all that share its store (1) or follows (0).",
        )
        self.takeovers = counter("ruvector_takeovers_total", "Times that this replica began to lead.")
        self.workers = gauge("ruvector_learner_workers", "Workers connected to the learner.")

    def trust(self, templates: Iterable[tuple[str, Trust]]) -> None:
        """Count the templates, given as (table, trust); one without a table counts in the sum only."""
        each = list(templates)
        counts = Counts(trust for _, trust in each)
        by_table = Counts(each)
        for trust in Trust:
            self.templates.labels(trust=trust.value).set(counts[trust])
            for table in {table for table, _ in each if table}:
                self.trusted.labels(table=table, trust=trust.value).set(by_table[table, trust])
