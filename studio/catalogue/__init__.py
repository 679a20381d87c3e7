"""Base models, adapters and their scores."""
