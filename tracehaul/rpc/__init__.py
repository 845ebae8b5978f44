"""Control plane: typed calls and streams between processes, over TCP or in process."""
