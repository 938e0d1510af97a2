"""What a trained model does: continue text, token by token, with keys and values kept."""
