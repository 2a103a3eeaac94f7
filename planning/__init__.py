"""Plans of a step on a cluster: compiled for it here, and read from the program."""
