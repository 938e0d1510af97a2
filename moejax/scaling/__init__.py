"""Scaling laws: published ones, fits to one's own runs, and their weights in an ensemble."""
