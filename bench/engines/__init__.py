"""Stock servers of other engines behind our router and our store."""
