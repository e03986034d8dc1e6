"""Preflight: compile the training step for hardware that is not here, and say what it will need and cost."""
