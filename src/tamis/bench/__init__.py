"""Measuring plans: tasks, a runner, a report."""
