"""The forward pass on the CPU: kernels compiled at run time, and what they need around them."""
