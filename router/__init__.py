"""HTTP in, token stream out: traces, index, placement, dispatch."""
