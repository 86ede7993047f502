"""Methods of the stage `budget`."""
