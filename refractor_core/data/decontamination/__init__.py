"""Training documents that hold what is evaluated on: ``items`` finds the overlap, ``stage`` takes them out of a build."""
