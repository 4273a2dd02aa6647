"""A model as a C library with its weights."""
