"""Runs steps on the fleet: where, on whom after a failure, and what becomes of their context."""
