"""Other servers, started to be compared with."""
