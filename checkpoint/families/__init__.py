"""One file per public family: its config's keys, and the tables of its tensors."""
