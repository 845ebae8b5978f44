"""The traces: what was said and computed in them, and what was decided."""
