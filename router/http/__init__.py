"""HTTP surface: every dialect at its path, and pages to look at."""
