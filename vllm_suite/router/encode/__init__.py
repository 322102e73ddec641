"""The encode stage: media parts of chat requests, encoded on instances of their own before or beside prefill."""
