"""What every room of the cluster shares: wire types, runtime, rpc, transfer, engine."""

__version__ = "0.1.0"
