"""The embedded model: a miniature text-to-image diffusion model of coloured shapes."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped pipeline folder, as `StableDiffusionPipeline.from_pretrained` reads it."""
