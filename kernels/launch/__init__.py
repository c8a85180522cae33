"""Code shared by all ops: checks of arguments, launch configs, launches, and compilation ahead of time."""
