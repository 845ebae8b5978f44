"""What measurements share: the form of a result, a fleet of real processes, recordings."""
