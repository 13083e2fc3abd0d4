"""Sources: where networks, weights and data come from; the only room that reads what a user names."""
