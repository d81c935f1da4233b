"""`hf-stateless convert-config`: from DeepSpeed and FSDP1 to FSDP2."""
