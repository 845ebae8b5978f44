"""Engines that others made, as workers of a fleet: what runs in their stock servers, and what speaks to these."""
