"""What outlives every process of a cluster: rows in a database, whichever it is."""
