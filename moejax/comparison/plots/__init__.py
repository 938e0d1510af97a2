"""Figures of the report. Only files in this folder import matplotlib, and they do not use the global state of
pyplot."""
