"""``tracehaul batch``: calls from a file, against an endpoint that runs."""
