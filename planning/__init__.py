"""What a step of a run would need on a cluster: compiled for it here, and read from the program."""
