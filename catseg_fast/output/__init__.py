"""Files that users get: overlays, label maps, summaries, statistics. May import ground modules only."""
