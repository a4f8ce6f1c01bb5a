"""Who runs what `fastvlm.models` describes: each sentence of a layer's mathematics stands once."""
