"""Benchmarks and the demonstration: an embedded server, real data, measured tables and plots."""
