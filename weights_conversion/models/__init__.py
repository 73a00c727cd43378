"""Whole models: what a file or folder holds, and how it is converted."""
