"""Layout of the ranks, meshes, sharded parameters, gradient reduction."""
