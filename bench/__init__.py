"""Benchmarks: first proved right, then timed against peers in the same run. ``python -m bench``."""
