"""What a node has in memory, who may read it and what gives way: pure."""
