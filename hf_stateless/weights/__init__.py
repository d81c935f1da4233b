"""How a weight is stored and rounded: stochastic rounding of bf16, weights in int8."""
