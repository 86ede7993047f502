"""Training what ships with the project, and what methods learn."""
