"""Experiment configs: frozen dataclasses, named model sizes, whole runs, and the command line."""
