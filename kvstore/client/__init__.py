"""Reading from and writing to every store node: what workers hold."""
