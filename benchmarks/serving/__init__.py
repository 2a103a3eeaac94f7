"""Servers under load: what scripts/bench_serving.py measures."""
