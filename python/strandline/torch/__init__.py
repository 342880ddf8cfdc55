"""Strandline's side of PyTorch. The one part of the package that imports ``torch``."""

from __future__ import annotations

from strandline.torch.rng import RngState

__all__ = ["RngState"]

# Found, and shown in tracebacks and pickles, under the package's own name.
RngState.__module__ = __name__
