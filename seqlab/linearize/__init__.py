"""Turning a pretrained transformer into a model with a state of constant size."""
