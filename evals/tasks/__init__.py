"""One file per benchmark; each has TASKS, a tuple of tasks and families (evals/samples.py)."""
