"""Supervision on one host: who starts its nodes, starts them again when they die, and tells of them."""
