"""How good is it? Scores on held-out documents, the gate between two models, and the report that shows a run.

Importing this room is cheap; ``suite`` needs torch and ``report`` needs matplotlib and jinja2, each imported by its own name.
"""
