"""Class names: lists, prompts, text features. It may import ground modules only."""
