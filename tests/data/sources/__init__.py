"""Tests of the kinds of sources, one file each."""
