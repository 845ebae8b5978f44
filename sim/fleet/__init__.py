"""A fleet of a thousand workers as discrete events, under the router's own policies: no process, socket or engine.

Where :mod:`sim.world` runs the whole cluster's code to find what breaks, this runs the decisions alone, with the time
that everything else takes, to find what is gained. `router/policy`, the router's index and its books of workers are the
ones that the router has; workers, stores and links are formulas.
"""
