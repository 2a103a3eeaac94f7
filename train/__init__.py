"""Training and distillation: state, optimiser, losses, step, loop, report."""
