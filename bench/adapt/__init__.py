"""The loop that adapts a fleet, against every setting that is left alone."""
