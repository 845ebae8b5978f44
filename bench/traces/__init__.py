"""Placement, retention and the index, on recorded agents."""
