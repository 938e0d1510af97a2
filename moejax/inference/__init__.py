"""Generates and scores text with a trained model."""
