"""Code shared by all ops: declarations, checks of arguments, launch configs and launches."""
