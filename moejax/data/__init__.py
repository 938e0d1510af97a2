"""The input pipeline, from text to batches, in NumPy on the host.

documents (of files: columns, remote; of TFDS: tfds_source) -> sources -> tokenizers -> token_stream, or shards (written
by pack, and by seqio_streams) -> corpus -> packing (best_fit) -> mixture -> pipeline, and baselines beside them. Only
pipeline imports grain (which loads parts of JAX), so that a bad source is found before JAX starts: import the modules
themselves, this package re-exports nothing. Libraries of the extra `data` are imported through moejax.optional.
"""
