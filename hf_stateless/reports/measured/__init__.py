"""What a run took: measured while it runs, and left in its folder as JSON and as a picture."""
