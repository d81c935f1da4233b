"""The folder that `hf-stateless run` puts in front of PYTHONPATH; it holds `sitecustomize.py` and nothing else."""
