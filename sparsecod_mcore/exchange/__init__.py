"""Models from elsewhere, and from Megatron's checkpoints: their configurations and their weights."""
