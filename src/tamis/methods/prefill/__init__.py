"""Methods of the stage `prefill`."""
