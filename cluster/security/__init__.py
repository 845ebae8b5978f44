"""Who belongs to a cluster: its CA, its nodes' certificates and its join token, and what of them a node uses."""
