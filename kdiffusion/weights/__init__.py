"""Find, read, hold and write the weights of whole models."""
