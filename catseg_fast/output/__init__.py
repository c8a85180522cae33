"""Files that users get: overlays, label maps, summaries, statistics. May import inference and text."""
