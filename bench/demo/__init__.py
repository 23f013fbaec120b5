"""The demonstration: a real application workload, direct and through the proxy."""

from bench.demo.main import main

__all__ = ["main"]
