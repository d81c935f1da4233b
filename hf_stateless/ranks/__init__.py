"""Who holds which part of a matrix, and how ranks work on it together."""
