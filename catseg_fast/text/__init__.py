"""Class names: lists, prompts, text features. May import ground modules only."""
