"""Compares dense and mixture-of-experts models at equal step time: measures, matches, trains and reports."""
