"""What joins other people's engines to the fleet."""
