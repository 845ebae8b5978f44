"""How much of an agent's own answers its next prompt finds again: ``python -m bench.prefix``."""
