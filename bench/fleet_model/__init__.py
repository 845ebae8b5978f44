"""Fleets of a thousand workers, simulated: recordings at full size under our policies and those of others."""
