"""The update of one matrix: its normalised gradient written into its weight, by a kernel or by torch."""
