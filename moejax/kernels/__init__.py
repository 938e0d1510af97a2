"""Kernels. Each is one function that chooses the best backend for the platform."""
