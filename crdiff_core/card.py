"""Prepare a folder for the Hugging Face hub: `python -m crdiff_core.card --help`."""

from __future__ import annotations

import html
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from crdiff_core import commands
from crdiff_core.commands import UsageError
from crdiff_core.errors import RatiosError
from crdiff_core.models import DTYPES, HUB_ID
from crdiff_core.ratios import DEFAULT_POA_WEIGHT, GROUPS, RatiosFile, Resolution, is_number

RATIOS_NAME = "best_ratios.json"

_LONGEST = 200
_VERDICTS = {
    "better": "**Better than the dense model** in mean reward: {0}.",
    "worse": "**Worse than the dense model** in mean reward: {0}. These ratios are no "
    "improvement.",
    "no difference shown": "**No difference shown** between these ratios and the dense model in "
    "mean reward: {0}. By this search there is no reason to prune.",
    "no verdict": "**No verdict** on these ratios against the dense model in mean reward: {0}.",
}
_NOT_VALIDATED = (
    "**Not validated**: these ratios were not compared with the dense model on pictures by which "
    "nothing was chosen, so nothing here says that they improve on it."
)
_CITATION = """\
    @misc{ren2026crdiff, title={Cross-Resolution Diffusion Models via Network Pruning},
      author={Jiaxuan Ren and Junhan Zhu and Huan Wang}, year={2026}, eprint={2604.05524},
      archivePrefix={arXiv}, primaryClass={cs.CV}}"""


def model_card(
    file: RatiosFile, base_model: str | None = None, licence: str = "other", picture: str = ""
) -> str:
    """Return the README.md of a hub repository that holds this ratios file.

    base_model: the hub id of the model to prune; None: the file's, if it names one.
    picture:    the name of one beside it, to show.
    What is not known is left out; whatever the file says is escaped. Needs no network.
    Raises UsageError for a base model that is no hub id.
    """
    # A second to import: not for --help or a wrong option.
    from huggingface_hub import ModelCard, ModelCardData

    source = _mapping(file.provenance, "source")
    if base_model is None and "file" not in source:
        base_model = str(source.get("hub_id") or "") or None
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise UsageError(
            f"base model {base_model!r} is not OWNER/NAME: give it by --base-model OWNER/NAME"
        )
    data = ModelCardData(
        base_model=base_model,
        license=licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["cr-diff", "pruning", "text-to-image"],
    )
    shown = f"![Dense and CR-Diff, from the same noise]({picture})\n\n" if picture else ""
    sections = f"""\
# CR-Diff ratios for {_escaped(file.model)} at {file.resolution}

{_verdict(file)}

{shown}How much of each block group of the UNet is pruned, for pictures of {file.resolution} \
pixels (height x width):

{_ratios_table(file)}

CR-Diff ([arXiv:2604.05524](https://arxiv.org/abs/2604.05524)) zeroes the smallest weights of the \
self-attention and feed-forward layers, and combines, at each denoising step, what the pruned and \
the dense UNet say: `z = k * z_pruned + (1 - k) * z_dense`, with k = {_poa_weight(file):g}. Other \
models and sizes need other ratios.

## How they were found

{_table(_found(file))}

Found by crdiff-search; `{RATIOS_NAME}` says the rest.

## How to use them

{_usage(file, base_model)}

The file has the keys of the paper's reference implementation, whose scripts read it too.

## Citation

{_CITATION}
"""
    # Made again from its text, as the hub will: front matter that cannot be read raises here.
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{sections}"))


def _verdict(file: RatiosFile) -> str:
    found = _mapping(file.provenance, "validation")
    sentence = _VERDICTS.get(str(found.get("verdict")))
    summary, note = (_escaped(str(found.get(name) or "")) for name in ("summary", "note"))
    if sentence is None or not summary:
        return _NOT_VALIDATED
    return f"{sentence.format(summary)} {note}".strip()


def _ratios_table(file: RatiosFile) -> str:
    sparsity = _mapping(file.provenance, "sparsity")
    rows = ["| block group | ratio | zeros, measured |", "|---|---|---|"]
    for group in GROUPS:
        measured = sparsity.get(group)
        rows.append(
            f"| {group} | {file.ratios[group]:g} "
            f"| {f'{measured:.4f}' if is_number(measured) else 'not recorded'} |"
        )
    return "\n".join(rows)


def _found(file: RatiosFile) -> dict[str, str]:
    """Return what is known of the search, escaped, by what it is."""
    known, recipe = file.provenance, commands.recipe_of(file)
    source, searcher = _mapping(known, "source"), _mapping(known, "searcher")
    prompts = _mapping(known, "prompts")
    rows: dict[str, object] = {
        "model": source.get("hub_id") or source.get("file") or file.model,
        "its revision": source.get("hub_revision") or recipe.get("revision"),
        "searcher": searcher.get("name"),
        "seed": known.get("seed"),
        "evaluations": known.get("num_evaluations"),
        "reward": recipe.get("reward"),
        "its version": recipe.get("reward_version"),
        **{
            f"{name} prompts": f"{_mapping(prompts, name).get('num_prompts')}, digest "
            f"{str(_mapping(prompts, name).get('digest'))[:16]}"
            for name in ("search", "rerank", "validation")
            if name in prompts
        },
        "mean reward on the search prompts": f"{file.score:.4f}, which flatters: the best of many "
        "noisy scores is too good",
        "dense model on the same": known.get("dense_score"),
        "drawn with": ", ".join(
            f"{name} {recipe[key]}"
            for key, name in (
                ("num_steps", "steps"),
                ("guidance_scale", "guidance"),
                ("scheduler", "scheduler"),
                ("dtype", "dtype"),
                ("negative_prompt", "negative prompt"),
            )
            if recipe.get(key) is not None
        ),
    }
    return {
        name: _escaped(f"{value:.4f}" if isinstance(value, float) else str(value))
        for name, value in rows.items()
        if value is not None and value != ""
    }


def _usage(file: RatiosFile, base_model: str | None) -> str:
    recipe = commands.recipe_of(file)
    drawing = [f"height={file.resolution.height}", f"width={file.resolution.width}"]
    for key, name in (("num_steps", "num_inference_steps"), ("guidance_scale", "guidance_scale")):
        if is_number(recipe.get(key)):
            drawing.append(f"{name}={recipe[key]}")
    if isinstance(recipe.get("negative_prompt"), str):
        drawing.append(f"negative_prompt={recipe['negative_prompt']!r}")
    with suppress(RatiosError):  # `requested` is no size.
        told = Resolution.parse(str(recipe.get("size_conditioning")))
        size = f"({told.height}, {told.width})"
        drawing += [f"original_size={size}", f"target_size={size}"]
    dtype = recipe.get("dtype")
    precision = f", dtype=torch.{dtype}" if dtype in DTYPES else ""
    return f"""\
    import crdiff_core, diffusers, torch  # crdiff_core comes with crdiff-search
    pipe = diffusers.DiffusionPipeline.from_pretrained("{base_model or "MODEL"}"{precision})
    with crdiff_core.applied(pipe, "{RATIOS_NAME}"):
        pipe("PROMPT", {", ".join(drawing)}).images[0]

`python -m crdiff_core.generate --ratios {RATIOS_NAME} --prompt PROMPT` draws dense and CR-Diff \
side by side; `python -m crdiff_core.bake` saves the pruned model alone as an ordinary diffusers \
folder."""


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {text} |" for name, text in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _poa_weight(file: RatiosFile) -> float:
    return DEFAULT_POA_WEIGHT if file.poa_weight is None else file.poa_weight


def _escaped(text: str) -> str:
    """Return a text for Markdown in which nothing of it is markup, in one line."""
    line = " ".join(text.split())[:_LONGEST]
    return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", html.escape(line, quote=False))


def _mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


# --- the command line ------------------------------------------------------------------------


def _parser() -> commands.Parser:
    parser = commands.Parser(
        prog="python -m crdiff_core.card",
        description="Prepare a folder for the Hugging Face hub: the ratios file, and a model card "
        "that says what they are worth. Nothing is sent anywhere.",
    )
    add = parser.add_argument
    add("--ratios", type=Path, required=True, metavar="JSON", help="an exported best_ratios.json")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder to prepare")
    add("--picture", type=Path, metavar="FILE", help="to show, such as crdiff_core.generate's")
    add("--base-model", metavar="OWNER/NAME", help="the model to prune; default: the file's")
    add("--license", default="other", metavar="ID", help="the hub's name for it; default: other")
    return parser


def _check_picture(picture: Path) -> None:
    try:
        with Image.open(picture) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError) as error:  # PIL's own for a broken PNG.
        raise UsageError(f"--picture {picture}: not a readable picture ({error})") from error


def _prepare(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    file = RatiosFile.read(options.ratios)
    name = ""
    if options.picture is not None:
        _check_picture(options.picture)
        name = f"picture{options.picture.suffix.lower()}"
    card = model_card(file, options.base_model, options.license, name)
    with commands.new_folder(options.out) as draft:
        shutil.copyfile(options.ratios, draft / RATIOS_NAME)
        (draft / "README.md").write_text(card, encoding="utf-8")
        if name:
            shutil.copyfile(options.picture, draft / name)
    print(options.out)
    print(f"read it, then publish it with: hf upload OWNER/NAME {shlex.quote(str(options.out))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the folder that the command line asks for; return the exit code."""
    return commands.run(_prepare, arguments)


if __name__ == "__main__":
    sys.exit(main())
