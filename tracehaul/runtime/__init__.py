"""What every process needs: clock, offload, config, logging, metrics, tasks, node lifecycle."""
