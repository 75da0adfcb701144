"""Rooms of ``gpu_suite.py``: ``timing`` and ``contest`` for all; a room per kind of work with its peers; ``report`` for goals and plots."""
