"""Sparse layers in three parts, each swappable alone: router, dispatch, experts."""
