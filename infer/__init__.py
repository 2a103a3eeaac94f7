"""Using a trained model: scoring text, sampling, generating."""
