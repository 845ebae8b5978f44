"""A worker whose steps a stock server computes: it speaks HTTP to that, and the messages of steps to the fleet."""
