"""Published results reproduced with this code: what was published, what comes out here, how far apart they are."""
