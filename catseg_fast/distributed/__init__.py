"""Processes that work together: torchrun, shares of the work, one rank that leads the others.

May import ground modules and the engine.
"""
