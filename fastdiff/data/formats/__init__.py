"""Where images come from: each file here registers a format, and ``load_dataset`` asks them all."""
