"""Evaluation of Florenz models as in arXiv 2503.09443, on its four sets and on the small world.

answers.py     what a model writes about a set, and which translation it finds likelier
records.py     answers.jsonl
tokens.py      words, as CIDEr counts them
metrics.py     BLEU, chrF, CIDEr, METEOR, COMET, CLIPScore
paper.py       the paper's own figures
report.py      results as JSON, and a table beside the paper's
command.py     ``fastvlm florenz evaluate``
"""
