"""Policies compared offline: recall curves recorded once from a real server, replayed through the product.

record     real PostgreSQL + pgvector: recall of every query under every ef_search, and what each costs
traffic    labels and unseen queries drawn from a recording: mixed, homogeneous, Zipf, moved repetitions
published  the plan's published targets, measured
main       ``python -m bench.replay``: labels -> distillation -> snapshot -> optimizer -> recall and cost
"""
