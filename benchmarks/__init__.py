"""Measurements: what scripts/bench_*.py run, and the peers they compare with."""
