"""Families beyond Florence-2 at their true shapes, beside transformers and CTranslate2."""
