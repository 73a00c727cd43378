"""Compute whole feature maps fast; the layers call this room."""
