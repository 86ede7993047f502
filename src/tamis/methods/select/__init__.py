"""Methods of the stage `select`."""
