"""The store beside memcpy, raw TCP, other stores and disks."""
