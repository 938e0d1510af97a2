"""The transformer: Flax NNX modules that hold only parameters."""
