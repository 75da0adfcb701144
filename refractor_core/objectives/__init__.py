"""The language-model loss and the routers' auxiliary losses, each with its target band.

Every loss is a sum over tokens or sequences divided by a count of the *global* batch, so micro batches and ranks add up to it.
"""
