"""Converts models of other frameworks."""
