"""The GPU kernels' cases timed on a GPU, and what a data sheet says of them without one."""
