"""Command line, cluster config, launching, the host process of a node."""
