"""What the GPU compiler makes of the kernels, without a GPU: compiled, counted, held to limits.

`scripts.check_kernels` runs it; benchmarks/compile_checks/compiled.json keeps the results.
"""
