"""Speed and memory beside other implementations, as ratios measured side by side in one run."""
