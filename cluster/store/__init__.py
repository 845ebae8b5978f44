"""``tracehaul store``: what an operator asks of the store nodes of a running cluster, and tells them."""
