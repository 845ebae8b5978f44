"""What runs the model, behind one async interface: torch, and a fake for determinism."""
