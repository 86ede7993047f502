"""Methods of the stage `codec`."""
