"""Scores of the PyPI package image-reward 1.5, written to a folder for a test to compare with.

Runs in an environment of the package's own (test_image_reward_parity.py makes it), where our
packages are not. Usage: python image_reward_parity.py FOLDER. FOLDER holds `bert-base-uncased`
with a vocabulary; this adds ImageReward.pt with random weights, pictures and package.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# One picture to each prompt; widths before heights, as PIL has them.
CAT = "A cat holding a sign that says hello world"
BILLBOARD = "A billboard in Times Square showing the text 'FUTURE IS NOW' in bold neon letters"
ODD = "a café,\tÜBER-naïve 東京 robot; 3.5% of it isn't [ENC] 🙂 " + "word after word " * 20
PAIRS = ((CAT, (512, 512)), (BILLBOARD, (360, 480)), (ODD, (301, 200)))
TEXTS = (
    "",
    " ",
    "[CLS] [SEP] [PAD] [DEC]",
    "a" * 300,
    "x\u00a0y\u2028z\u200b",
    "don't e-mail #1!",
)

# BLIP's own configs/med_config.json, which the package would fetch from the hub.
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def import_package():
    """Import image-reward also where torchvision is built for CUDA and torch is not."""
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        torch.ops.load_library(str(next(folder.glob("_C*.so"))))
    except OSError:
        # The package uses torchvision's transforms only, but the import names these operators.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_package.keep = library
    import ImageReward

    return ImageReward


def draw(index: int, size: tuple[int, int]) -> Image.Image:
    """A picture with slopes, edges and grain."""
    width, height = size
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:height, 0:width]
    slopes = rng.uniform(-1, 1, (3, 2)) @ np.stack([x.ravel() / width, y.ravel() / height])
    pixels = 0.5 + 0.4 * slopes.T.reshape(height, width, 3)
    for _ in range(12):
        centre, radius = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.04, 0.25) * width
        pixels[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = rng.uniform(0, 1, 3)
    pixels += rng.normal(0, 0.03, pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def squashed(picture: Image.Image) -> Image.Image:
    """The picture at 256x256; along the width first, as Pillow always did before 13."""
    for size in ((256, picture.height), (256, 256)):
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return picture


def randomise(model: torch.nn.Module) -> None:
    """Give every weight its own value, so that no two can be swapped without a trace."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.startswith("mlp.") and weight.ndim == 2:
            weight.data = noise * weight.shape[1] ** -0.5  # As large a score as its input.
        elif weight.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
            weight.data = 1 + 0.1 * noise
        elif (
            any(part in name for part in (".attention.", ".query.", ".key.")) and weight.ndim == 2
        ):
            weight.data = 0.05 * noise  # At 0.02 all tokens become one, whatever the prompt.
        else:
            weight.data = 0.02 * noise


def main(folder: Path) -> None:
    """Write weights, pictures and what the package makes of them."""
    os.chdir(folder)  # The package loads its tokenizer as "bert-base-uncased": the folder here.
    package = import_package()
    Path("med_config.json").write_text(json.dumps(MED_CONFIG))
    model = package.ImageReward(med_config="med_config.json")
    randomise(model)
    torch.save(model.state_dict(), "ImageReward.pt")
    del model

    model = package.load("ImageReward.pt", device="cpu", med_config="med_config.json")
    pictures = []
    for index, (_, size) in enumerate(PAIRS):
        draw(index, size).save(f"{index}.png")
        pictures.append(Image.open(f"{index}.png"))
    pixels = [model.preprocess(picture) for picture in pictures]
    np.save("pixels.npy", torch.stack(pixels).numpy())
    prompts = [prompt for prompt, _ in PAIRS]
    texts = [*prompts, *TEXTS]
    encoded = model.blip.tokenizer(texts, padding="max_length", truncation=True, max_length=35)
    with torch.no_grad():
        result = {
            "prompts": prompts,
            "scores": [model.score(prompts[i], pictures[i]) for i in range(len(prompts))],
            # Squashed first, as CR-Diff's reference implementation does.
            "squashed_scores": [
                model.score(prompt, squashed(picture))
                for prompt, picture in zip(prompts, pictures, strict=True)
            ],
            "scores_of_first_prompt": model.inference_rank(prompts[0], pictures)[1],
            "texts": texts,
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "num_parameters": sum(weight.numel() for weight in model.parameters()),
        }
    Path("package.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
