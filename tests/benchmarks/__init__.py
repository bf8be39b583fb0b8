"""Measurements; run by name, never with the tests."""
