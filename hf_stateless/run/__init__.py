"""Scripts and commands that do not import hf_stateless."""
