"""Pure losses that return sums."""
