"""Read named arrays from files of unknown origin, and write them."""
