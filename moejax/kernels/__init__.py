"""Hot inner loops: one function each; the best backend is chosen inside."""
