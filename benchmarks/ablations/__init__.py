"""The A/B experiments of scripts/ablations.py: one file per figure of the articles."""
