"""Draw dense and CR-Diff pictures side by side: `python -m crdiff_core.generate --help`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from crdiff_core import sheet
from crdiff_core.errors import CRDiffError, PromptError, RatiosError
from crdiff_core.models import EMBEDDED, Model
from crdiff_core.prompts import Prompt, noise_seed, read_texts
from crdiff_core.ratios import DEFAULT_POA_WEIGHT, GROUPS, BlockRatios, RatiosFile, Resolution
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

    ratios_file: where the ratios came from, to be checked against the model; None: given by hand.
    told_size:   what SDXL is told of a picture's size; None: its own.
    zoom:        how many pixels, each way, one pixel of a picture becomes.
    """

    model: Model
    ratios: BlockRatios
    ratios_file: Path | None
    poa_weight: float
    resolution: Resolution
    num_steps: int
    guidance_scale: float
    told_size: Resolution | None
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


class _UsageError(CRDiffError, ValueError):
    """An option is missing or wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print its usage, many lines, above the message.
        raise _UsageError(f"{message} (--help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m crdiff_core.generate",
        description="Draw prompts with the dense model and with CR-Diff, from the same noise.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        help="shapes, a diffusers folder, a .safetensors checkpoint or a hub id in the local "
        "cache; default: that of the ratios file",
    )
    add("--ratios", type=Path, metavar="JSON", help="an exported best_ratios.json, or:")
    for group in GROUPS:
        add(f"--{group}", type=float, metavar="R", help=f"the ratio of the {group} blocks")
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
    by_hand = {group: getattr(options, group) for group in GROUPS}
    file = None
    if options.ratios is not None:
        if any(ratio is not None for ratio in by_hand.values()):
            raise _UsageError("--ratios and --down/--mid/--up: give either the file or the three")
        file = RatiosFile.read(options.ratios)
        ratios, resolution = file.ratios, file.resolution
        poa_weight = DEFAULT_POA_WEIGHT if file.poa_weight is None else file.poa_weight
    else:
        missing = [f"--{group}" for group, ratio in by_hand.items() if ratio is None]
        if missing:
            raise _UsageError(f"no {' '.join(missing)}: give --ratios FILE, or all three ratios")
        ratios, resolution = BlockRatios(**by_hand), None
        poa_weight = DEFAULT_POA_WEIGHT
    if options.res is not None:
        resolution = Resolution.parse(options.res)
    if resolution is None:
        raise _UsageError("no resolution: give --res HEIGHTxWIDTH, or --ratios with a file")
    num_steps, guidance_scale, dtype, told_size = _recipe(options, file)
    for name, value, least in (
        ("--steps", num_steps, 1),
        ("--guidance", guidance_scale, 0),
        ("--seed", options.seed, 0),
        ("--zoom", options.zoom, 1),
    ):
        if value is not None and not least <= value < math.inf:
            raise _UsageError(f"{name} {value}: give at least {least}, and a finite number")
    if options.poa_weight is not None:
        poa_weight = options.poa_weight
    if not math.isfinite(poa_weight):
        raise _UsageError(f"--poa-weight {poa_weight}: give a finite number, such as 1.5")
    model = _model(options.model, dtype, file)
    model.check()
    model.check_resolution(resolution)
    _check_made_for(file, model)
    return Drawing(
        model,
        ratios,
        options.ratios,
        poa_weight,
        resolution,
        num_steps,
        guidance_scale,
        told_size if model.is_size_conditioned else None,
        _prompts(options),
        options.zoom or legible_zoom(resolution.height, resolution.width),
    )


def _recipe(
    options: argparse.Namespace, file: RatiosFile | None
) -> tuple[int, float, str, Resolution | None]:
    """Return steps, guidance, dtype, SDXL's size: the options', else the search's, else ours."""
    recipe = file.provenance.get("recipe") if file else None
    known = recipe if isinstance(recipe, dict) else {}
    told_size = str(known.get("size_conditioning", "requested"))
    try:
        return (
            int(known.get("num_steps", DEFAULT_STEPS)) if options.steps is None else options.steps,
            float(known.get("guidance_scale", DEFAULT_GUIDANCE))
            if options.guidance is None
            else options.guidance,
            str(known.get("dtype", "float32")),
            None if told_size == "requested" else Resolution.parse(told_size),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise RatiosError(
            f"{options.ratios}: provenance.recipe is broken ({error}): give --steps and --guidance"
        ) from error


def _check_made_for(file: RatiosFile | None, model: Model) -> None:
    # `apply` says so too, but only once the model is loaded.
    searched = file.provenance.get("num_prunable") if file else None
    if searched is not None and searched != model.num_prunable():
        assert file is not None
        raise RatiosError(
            f"these ratios are of {file.model}, whose groups have {searched} prunable weights, "
            f"and those of {model.folder} have {model.num_prunable()}: search this model, or give "
            "the ratios by --down, --mid and --up"
        )


def _model(source: str | None, dtype: str, file: RatiosFile | None) -> Model:
    found = file.provenance.get("source") if file else None
    known = found if isinstance(found, dict) else {}
    hub_id, revision = str(known.get("hub_id", "")), str(known.get("hub_revision", "main"))
    if source is None and file is not None and "file" not in known:
        source = hub_id or (file.model if file.model in EMBEDDED else None)
    if source is None:
        raise _UsageError(
            "no --model, and no ratios file that names one on the hub: give shapes, a folder, a "
            ".safetensors checkpoint or a hub id (OWNER/NAME)"
        )
    return Model.find(source, dtype, hub_id, revision)


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
        raise _UsageError(f"--out {out}: not the name of a picture: end it with .png")
    if not os.access(out.parent, os.W_OK):
        raise _UsageError(f"--out {out}: {out.parent} is not a folder you may write to")


def _say(message: Warning | str, *_: Any) -> None:
    """Show a warning in one line, without the code that gave it."""
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for; return the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        options = _parser().parse_args(arguments)
        _check_writable(options.out)
        drawing = _drawing(options)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(
                f"warning: {message}", file=sys.stderr
            )
            arrange(drawing, *draw(drawing)).save(options.out)
    except (CRDiffError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
