"""Phantoms and conformance suites for this project's tests and for plugin authors'."""
