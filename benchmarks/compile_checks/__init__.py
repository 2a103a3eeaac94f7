"""Compile checks: the GPU kernels compiled without a GPU, counted, held to limits.

`scripts.check_kernels` runs it; benchmarks/compile_checks/compiled.json keeps the results.
"""
