"""Methods of the stage `merge`."""
