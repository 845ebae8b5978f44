"""Where a cluster's routers are: as its plan says, or as routers register themselves."""
