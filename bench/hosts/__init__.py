"""What a fleet of hosts costs: its control plane, and encryption."""
