"""Mixers compared: trained on one task under one protocol, and drawn on one page."""
