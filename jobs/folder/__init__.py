"""Files and batches in a folder of a disk, of one process at a time."""
