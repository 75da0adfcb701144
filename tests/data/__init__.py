"""Tests of the data room; a package, so that they share ``corpora``."""
