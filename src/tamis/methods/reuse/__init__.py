"""Methods of the stage `reuse`."""
