"""Convert texts to rows of token ids."""
