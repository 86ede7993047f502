"""Fitting programs: what a method learns about a model, from the model alone or from any text."""
