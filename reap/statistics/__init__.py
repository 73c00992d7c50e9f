"""Exact sums, per layer and per model, and their file."""
