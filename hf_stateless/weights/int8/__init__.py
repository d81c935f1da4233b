"""Linear layers whose weights are stored in 8 bits and trained as such: no float copy of them is ever kept."""
