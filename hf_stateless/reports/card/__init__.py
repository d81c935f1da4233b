"""What the Hub gets of a run: a model card with its memory report, pushed without anything private."""
