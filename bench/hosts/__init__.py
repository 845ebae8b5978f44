"""What a fleet of hosts costs."""
