"""Measurements: each writes JSON under stable names."""
