"""The AgentX harness over our router, and over what stock stacks do."""
