"""One store node: an index over memory, served."""
