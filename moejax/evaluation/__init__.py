"""Evaluates trained models on held-out text and on benchmarks."""
