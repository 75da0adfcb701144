"""Duplicates among documents: exact, near, and paragraphs that repeat.

Texts stay on disk; what is sorted and compared are numbers (hashes, MinHash signatures, positions), in files and in bounded memory.
``hashes`` says when two texts are the same, ``sketches`` holds what is kept of each, ``records`` sorts on disk, ``candidates`` finds pairs
that may be near, ``verify`` compares them exactly, ``clusters`` says which copy stays, and ``search`` is all of it.
"""
