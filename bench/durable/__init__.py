"""What it costs that work outlives the processes that do it."""
