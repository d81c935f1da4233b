"""A gradient in, an update of entry RMS 1 out: norm projections, whitenings, Sinkhorn, chains of them, presets."""
