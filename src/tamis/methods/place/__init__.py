"""Methods of the stage `place`."""
