"""Output-length distributions learned online. Not landed yet."""
