"""Blocks on several nodes: who makes copies, and who gets them when a node leaves."""
