"""Making models smaller without a teacher: pruning, merging of experts, rounding to few bits."""
