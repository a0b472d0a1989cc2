"""The files beside the weights."""
