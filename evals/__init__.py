"""Benchmarks of trained models, one file per task."""
