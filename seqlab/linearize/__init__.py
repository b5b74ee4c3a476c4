"""Turning a pretrained transformer into a recurrent model: the top floor, not furnished yet."""
