"""One module a language: its words, how they agree, and in which order they stand.

Each has ``CASES``, ``noun_phrase(group, case)`` and ``sentence(scene, frame)``.
"""
