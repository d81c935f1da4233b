"""What a run will take, took, and says of itself on the Hub."""
