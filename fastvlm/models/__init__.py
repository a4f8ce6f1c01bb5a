"""What the models are: which module plays which part, read by one short reader for each family."""
