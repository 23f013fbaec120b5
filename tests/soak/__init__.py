"""Soak: mixed load for a long time, equal answers on both roads, and nothing that grows."""
