"""One training run: state, loss, step, loop, checkpoints, metrics."""
