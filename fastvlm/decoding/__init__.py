"""Decoding: caches that hold one copy of an image's keys and values for all its readers."""
