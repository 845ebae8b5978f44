"""A small fleet of real processes under more traces than its memory holds."""
