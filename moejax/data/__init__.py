"""The input pipeline, from text to batches, in NumPy on the host.

documents (of files: columns, remote; of TFDS: tfds_source) -> sources -> tokenizers -> token_stream, or shards (written
by pack and by seqio_streams) -> corpus -> packing (best_fit) -> mixture -> pipeline; and baselines. Only pipeline
imports grain (which loads parts of JAX), so that errors in sources are found before JAX is loaded. This package
re-exports nothing; import its modules. Libraries of the extra `data` are imported through moejax.optional.
"""
