"""Calls, whatever form they were asked in: from what a client wants to steps, from steps to what happens."""
