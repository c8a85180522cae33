"""Helpers of the tests; no test module is imported by another."""
