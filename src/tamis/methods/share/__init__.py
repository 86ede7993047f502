"""Methods of the stage `share`."""
