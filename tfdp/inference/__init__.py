"""A model read back from its run, and text from it."""
