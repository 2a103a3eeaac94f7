"""The A/B experiments of scripts/claims.py: one file per claim of the articles."""
