"""Tests: one folder for each room, and house, distributed, gpu, cluster and faults beside them.

A package, so that ``tests.ranks`` can be imported by the ranks' own processes.
"""
