"""Tried with the tools of those who run it; ``make test-ops``."""
