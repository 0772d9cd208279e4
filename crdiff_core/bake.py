"""Save the pruned model as an ordinary diffusers folder: `python -m crdiff_core.bake --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crdiff_core import commands
from crdiff_core.models import DTYPES, Model
from crdiff_core.ratios import BlockRatios


@dataclass(frozen=True)
class Baking:
    """What to save, and where: the whole pipeline with the pruned UNet, or that UNet alone.

    ratios: or the path of the file that has them, to be checked against the model.
    """

    model: Model
    ratios: BlockRatios | Path
    out: Path
    unet_only: bool


def save(baking: Baking) -> None:
    """Prune the model's UNet and save it as safetensors in the model's dtype, whole or not at all.

    It draws, bit for bit, what `apply` with poa_weight=1 draws. The safety checker and the
    watermark stay out, as they do where we draw.
    Raises ModelError, RatiosError or PruningError, or UsageError if `out` exists.
    Source: CR-Diff (arXiv:2604.05524), section 3.3.
    """
    with commands.new_folder(baking.out) as draft:
        # These take seconds to import: not for --help or a wrong option.
        import torch

        from crdiff_core.poa import bake

        pipe = bake(baking.model.load(torch.device("cpu")), baking.ratios)
        if pipe.vae.dtype != pipe.unet.dtype:  # Only to draw: it was read in the model's.
            pipe.vae.to(pipe.unet.dtype)
        for part in (pipe, pipe.unet, pipe.vae):
            # Else diffusers writes down where on this machine it was read from.
            part.register_to_config(_name_or_path=baking.model.name)
        saved = pipe.unet if baking.unet_only else pipe
        saved.save_pretrained(draft, safe_serialization=True)


def _parser() -> commands.Parser:
    parser = commands.Parser(
        prog="python -m crdiff_core.bake",
        description="Save the pruned model alone (poa_weight=1) as an ordinary diffusers folder.",
    )
    parser.add_ratios_and_model()
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="a new folder to save it in"
    )
    parser.add_argument(
        "--unet-only", action="store_true", help="save the UNet alone, not the whole pipeline"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: the one the ratios were searched in, or float32"
    )
    return parser


def _baking(options: argparse.Namespace) -> Baking:
    """Check the options. Raises CRDiffError for whatever would fail later."""
    ratios, file = commands.chosen_ratios(options)
    model = commands.chosen_model(options.model, options.dtype, file)
    if file is not None and file.poa_weight not in {None, 1.0}:
        commands.warn(
            f"these ratios were searched with poa_weight {file.poa_weight:g}, and what is saved "
            "draws with 1, the pruned model alone: to draw as the search did, which needs both "
            "UNets, use crdiff_core.apply"
        )
    return Baking(model, options.ratios or ratios, options.out, options.unet_only)


def _bake(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    commands.check_new(options.out)
    save(_baking(options))
    print(options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Save what the command line asks for; return the exit code."""
    return commands.run(_bake, arguments)


if __name__ == "__main__":
    sys.exit(main())
