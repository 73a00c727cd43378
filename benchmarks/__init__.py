"""Compare speed and memory with other implementations, side by side in one run."""
