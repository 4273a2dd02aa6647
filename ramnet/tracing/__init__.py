"""Records which slots of the memory each head writes and reads, and shows whose writes a token reads."""
