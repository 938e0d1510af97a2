"""Training: state, loss, step, loop, checkpoints and metrics."""
