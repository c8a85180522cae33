"""Shared by all ops: checks of arguments, launch configs, what is tuned and compiled ahead of time."""
