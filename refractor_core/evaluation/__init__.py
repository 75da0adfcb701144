"""Suites on held-out data, gate, report."""
