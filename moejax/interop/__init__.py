"""Models of other frameworks: their names and shapes for the same numbers."""
