"""What every process needs: clock, offload, logging, supervised tasks, waits that must end."""
