"""A fleet that changes its shape as its work does: one thing at a time, measured, taken back if in vain. Pure."""
