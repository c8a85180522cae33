"""Files for users: overlays, label maps, summaries, statistics. It may import ground modules only."""
