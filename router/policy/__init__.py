"""Pure decisions: where a step runs, and what becomes of a context between two steps."""
