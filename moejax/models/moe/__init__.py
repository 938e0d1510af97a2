"""Sparse layers in three independent parts: router, dispatch and experts."""
