"""Files: compressed models saved, loaded and exported."""
