"""Draw dense and CR-Diff pictures side by side: `python -m crdiff_core.generate --help`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from crdiff_core import commands, sheet
from crdiff_core.commands import UsageError
from crdiff_core.errors import PromptError, RatiosError
from crdiff_core.models import Model
from crdiff_core.prompts import Prompt, noise_seed, read_texts
from crdiff_core.ratios import (
    DEFAULT_POA_WEIGHT,
    BlockRatios,
    RatiosFile,
    Resolution,
    check_poa_weight,
)
from crdiff_core.sheet import Row, legible_zoom

if TYPE_CHECKING:
    from torch import Tensor

# The paper's recipe, for ratios that come without one.
DEFAULT_STEPS = 30
DEFAULT_GUIDANCE = 7.5

_BATCH = 4


@dataclass(frozen=True)
class Drawing:
    """What to draw: one row of two pictures, dense and CR-Diff, for each prompt.

    ratios_file:     where the ratios came from, to be checked against the model; None: given by
                     hand.
    told_size:       what SDXL is told of a picture's size; None: its own.
    negative_prompt: what guidance leads away from; None: the pipeline's own.
    zoom:            how many pixels, each way, one pixel of a picture becomes.
    """

    model: Model
    ratios: BlockRatios
    ratios_file: Path | None
    poa_weight: float
    resolution: Resolution
    num_steps: int
    guidance_scale: float
    told_size: Resolution | None
    negative_prompt: str | None
    prompts: tuple[Prompt, ...]
    zoom: int


def draw(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """Draw every prompt twice from the same noise.

    Returns the dense and the CR-Diff pictures, each (N, 3, H, W), float32 in [0, 1], on the CPU.
    Raises ModelError, RatiosError or RenderError.
    """
    # These take seconds to import: not for --help or a wrong option.
    import torch

    from crdiff_core.poa import apply
    from crdiff_core.replica import Replica, choose_device

    replica = Replica(
        drawing.model.load(choose_device()),
        drawing.resolution,
        num_steps=drawing.num_steps,
        guidance_scale=drawing.guidance_scale,
        poa_weight=drawing.poa_weight,
        size_conditioning=drawing.told_size,
        negative_prompt=drawing.negative_prompt,
    )
    if drawing.ratios_file is not None:  # Refuses ratios of another model.
        apply(replica.pipe, drawing.ratios_file, drawing.poa_weight)
    starts = range(0, len(drawing.prompts), _BATCH)
    columns = []
    for ratios in (BlockRatios(), drawing.ratios):
        replica.set_ratios(ratios)
        rows = [replica.render(drawing.prompts[start : start + _BATCH]) for start in starts]
        columns.append(torch.cat(rows).cpu())
    replica.close()
    return columns[0], columns[1]


def arrange(drawing: Drawing, dense: Tensor, pruned: Tensor) -> Image.Image:
    """Put the two columns into one labelled picture, nearest-neighbour enlarged."""
    titles = ["dense", f"CR-Diff {drawing.ratios}, k = {drawing.poa_weight:g}"]
    rows = [
        Row(prompt.text, [_picture(image) for image in pair])
        for prompt, *pair in zip(drawing.prompts, dense, pruned, strict=True)
    ]
    return sheet.arrange(rows, drawing.zoom, titles)


def _picture(image: Tensor) -> Image.Image:
    """image: (3, H, W) in [0, 1]."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


# --- the command line ------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = commands.Parser(
        prog="python -m crdiff_core.generate",
        description="Draw prompts with the dense model and with CR-Diff, from the same noise.",
    )
    parser.add_ratios_and_model()
    add = parser.add_argument
    add("--poa-weight", type=float, metavar="K", help="default: the file's, else 1.5")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add("--prompts-file", type=Path, metavar="FILE", help=".txt (one a line), .csv or .parquet")
    add("--res", metavar="HEIGHTxWIDTH", help="default: the file's")
    add("--steps", type=int, metavar="N", help=f"default: the file's, else {DEFAULT_STEPS}")
    add("--guidance", type=float, metavar="G", help=f"the same, else {DEFAULT_GUIDANCE}")
    add("--seed", type=int, default=0, help="of the noise, with each prompt's text; default: 0")
    add("--out", type=Path, default=Path("picture.png"), help="default: picture.png")
    add("--zoom", type=int, metavar="N", help="enlarge N times; default: tiny pictures alone")
    return parser


def _drawing(options: argparse.Namespace) -> Drawing:
    """Check the options. Raises CRDiffError for whatever would fail later."""
    ratios, file = commands.chosen_ratios(options)
    resolution = file.resolution if file else None
    if options.res is not None:
        resolution = Resolution.parse(options.res)
    if resolution is None:
        raise UsageError("no resolution: give --res HEIGHTxWIDTH, or --ratios with a file")
    num_steps, guidance_scale, told_size, negative_prompt = _recipe(options, file)
    for name, value, least in (
        ("--steps", num_steps, 1),
        ("--guidance", guidance_scale, 0),
        ("--seed", options.seed, 0),
        ("--zoom", options.zoom, 1),
    ):
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"{name} {value}: give at least {least}, and a finite number")
    poa_weight = file.poa_weight if file else None
    if options.poa_weight is not None:
        poa_weight = check_poa_weight(options.poa_weight)
    model = commands.chosen_model(options.model, None, file)
    model.check_resolution(resolution)
    return Drawing(
        model,
        ratios,
        options.ratios,
        DEFAULT_POA_WEIGHT if poa_weight is None else poa_weight,
        resolution,
        num_steps,
        guidance_scale,
        told_size if model.is_size_conditioned else None,
        negative_prompt,
        _prompts(options),
        options.zoom or legible_zoom(resolution.height, resolution.width),
    )


def _recipe(
    options: argparse.Namespace, file: RatiosFile | None
) -> tuple[int, float, Resolution | None, str | None]:
    """Return steps, guidance, SDXL's size, negative prompt: options', the search's, or ours."""
    known = commands.recipe_of(file)
    told_size = str(known.get("size_conditioning", "requested"))
    negative_prompt = known.get("negative_prompt")
    try:
        return (
            int(known.get("num_steps", DEFAULT_STEPS)) if options.steps is None else options.steps,
            float(known.get("guidance_scale", DEFAULT_GUIDANCE))
            if options.guidance is None
            else options.guidance,
            None if told_size == "requested" else Resolution.parse(told_size),
            None if negative_prompt is None else str(negative_prompt),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise RatiosError(
            f"{options.ratios}: provenance.recipe is broken ({error}): give --steps and --guidance"
        ) from error


def _prompts(options: argparse.Namespace) -> tuple[Prompt, ...]:
    texts = [*options.prompt, *(read_texts(options.prompts_file) if options.prompts_file else ())]
    if not texts or not all(text.strip() for text in texts):
        raise PromptError("no prompt: give --prompt TEXT, or --prompts-file FILE")
    # The noise that a search with this prompts.seed would draw them from.
    return tuple(
        Prompt(text, f"{index:03d}", noise_seed(text, options.seed))
        for index, text in enumerate(texts)
    )


def _check_writable(out: Path) -> None:
    if out.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"--out {out}: not the name of a picture: end it with .png")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: {out.parent} is not a folder you may write to")


def _generate(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    _check_writable(options.out)
    drawing = _drawing(options)
    arrange(drawing, *draw(drawing)).save(options.out)
    print(options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for; return the exit code."""
    return commands.run(_generate, arguments)


if __name__ == "__main__":
    sys.exit(main())
