"""Command-line verbs: `python -m scripts.NAME --help`."""
