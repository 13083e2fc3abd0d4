"""Stand-ins: modules that do what a packed one does, with a stock layer for every matrix in it."""
