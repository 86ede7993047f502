"""Methods of the stage `draft`."""
