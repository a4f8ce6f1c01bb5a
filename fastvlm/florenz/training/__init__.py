"""The reference trainer: the paper's recipe on the small world, from nothing to six languages."""
