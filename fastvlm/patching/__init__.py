"""Patches that put the modules into transformers' models."""
