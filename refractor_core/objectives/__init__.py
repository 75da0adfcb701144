"""The language model's loss and the auxiliary losses, each with its target band."""
