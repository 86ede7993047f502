"""Methods of the stage `heads`."""
