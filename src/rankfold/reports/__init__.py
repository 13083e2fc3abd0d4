"""Reports: what was done to a network, measured and shown."""
