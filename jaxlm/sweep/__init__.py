"""Sweeps: a grid of runs planned before it is paid for, trained by any number of workers, and collected."""
