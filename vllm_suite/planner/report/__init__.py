"""What a search found, as text, as a fleet file and as pictures."""
