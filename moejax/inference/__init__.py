"""Generation and log-likelihoods of a trained model."""
