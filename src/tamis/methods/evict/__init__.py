"""Methods of the stage `evict`."""
