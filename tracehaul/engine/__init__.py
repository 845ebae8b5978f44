"""What runs the model, behind one async interface: torch, and a fake for determinism."""

import os

# Read by torch's OpenMP runtime when it loads. Its threads otherwise spin at every barrier, and where a machine's cores
# are shared (two workers on one host, or anything else) spinning threads keep the working ones off the cores: measured
# with one of two cores taken, a prefill took 40 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
