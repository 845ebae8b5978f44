"""Block hash -> KV bytes, fleet wide. Knows neither tokens nor tensors nor models."""
