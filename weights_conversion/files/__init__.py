"""Files to named arrays, and back."""
