"""Imported before all else: Triton is told when it is loaded whether kernels run in its interpreter."""

import os

import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
