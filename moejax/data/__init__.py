"""From text to batches, in numpy on the host.

documents -> sources -> tokenizers -> token_stream -> corpus -> packing -> pipeline, and baselines beside them. Only
pipeline imports grain (which loads parts of JAX), so that a bad source is found before JAX starts: import the modules
themselves, this package re-exports nothing.
"""
