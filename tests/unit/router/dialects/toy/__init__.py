"""A dialect that nobody speaks."""
