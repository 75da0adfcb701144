"""Proofs about a run that anyone can repeat: what an archive holds, and which exit criteria its evidence meets."""
