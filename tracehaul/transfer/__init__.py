"""Data plane: one-sided copies between registered regions of different processes."""
