"""What a store node keeps below its memory: tiers of blocks, their policy, and the jobs that move blocks up."""
