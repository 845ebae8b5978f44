"""Many hosts: what a config says of them, where each node goes, and how they are reached, installed and told."""
