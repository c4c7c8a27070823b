"""Labels: the deltas of many adapters, computed by one process or several, in a folder on disk."""
