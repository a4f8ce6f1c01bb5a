"""fastvlm.check: a user's own batch through a model with and without fastvlm, compared."""
