"""Methods of the stage `tokens`."""
