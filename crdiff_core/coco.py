"""The COCO subset: captions of randomly chosen images, with the images, in one Parquet file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from crdiff_core.errors import PromptError

COCO_SIZE = 5000
COCO_SEED = 42
COCO_FILE = "coco5k.parquet"

# Rows written at once: with images of about 160 KB, 20 MB of memory.
_ROWS = 128
# A wait shorter than this needs no word.
_TELL_EVERY_S = 5.0

_SAMPLING = (
    "random.Random(seed): sample(num) of the image ids in the order in which they first occur in "
    "the annotations; then, in the order of the sample, choice() of each image's captions in the "
    "order of the annotations"
)


@dataclass(frozen=True)
class CocoCaptions:
    """What a captions file says.

    path:       the file.
    sha256:     of its bytes.
    by_image:   captions, in their order in the file, by the image's id; the ids stand in the order
                in which they first occur in the annotations.
    file_names: by the image's id.
    """

    path: Path
    sha256: str
    by_image: Mapping[int, Sequence[str]]
    file_names: Mapping[int, str]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> CocoCaptions:
        """Read captions_val2014.json or a file like it. Raises PromptError."""
        file = Path(path)
        try:
            content = file.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise PromptError(f"{path}: {reason}: give captions_val2014.json") from error
        try:
            raw = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}: not JSON ({error}): download it again") from error
        by_image: dict[int, list[str]] = {}
        for image_id, caption in _pairs(raw, "annotations", "image_id", "caption", file):
            by_image.setdefault(image_id, []).append(caption)
        return cls(
            file,
            hashlib.sha256(content).hexdigest(),
            by_image,
            dict(_pairs(raw, "images", "id", "file_name", file)),
        )


def _pairs(raw: object, key: str, number: str, text: str, file: Path) -> Iterator[tuple[int, str]]:
    """Yield an integer and a text of each entry of one of the file's lists."""
    entries = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not entries:
        raise PromptError(f"{file}: has no {key}: give captions_val2014.json")
    for index, entry in enumerate(entries):
        found = (entry.get(number), entry.get(text)) if isinstance(entry, dict) else (None, None)
        # As all of JSON's, a bool would count as an integer; Parquet has 64 bits for one.
        if type(found[0]) is not int or abs(found[0]) >= 2**63 or not isinstance(found[1], str):
            raise PromptError(
                f"{file}: {key}[{index}] has no {number} or no {text}: give captions_val2014.json"
            )
        try:
            found[1].encode()
        except UnicodeEncodeError as error:  # JSON can name halves of a character.
            raise PromptError(
                f"{file}: {key}[{index}] has a {text} that is no text ({error.reason}): download "
                "it again"
            ) from error
        yield found[0], found[1]


@dataclass(frozen=True)
class CocoPrompt:
    """One row of the subset: a caption, and the image that it describes."""

    text: str
    image_id: int
    file_name: str


def sample_captions(
    captions: CocoCaptions, num: int = COCO_SIZE, seed: int = COCO_SEED
) -> list[CocoPrompt]:
    """Draw images without repetition, and one caption of each.

    num:  images to draw, at least 1.
    seed: at least 0; the defaults are those of the paper's tables.
    Raises PromptError if there are fewer images.
    Source: the reference implementation of CR-Diff (arXiv:2604.05524), whose random.seed(42)
    gives the module's functions the state that a Random of its own has here.
    """
    if len(captions.by_image) < num:
        raise PromptError(
            f"{captions.path}: has captions of {len(captions.by_image)} images and {num} are "
            "asked for: lower --num"
        )
    draw = random.Random(seed)
    drawn = draw.sample(list(captions.by_image), num)
    prompts = []
    for image_id in drawn:
        caption = draw.choice(captions.by_image[image_id])
        if image_id not in captions.file_names:
            raise PromptError(
                f"{captions.path}: image {image_id} has captions and no place in the list of "
                "images: download it again"
            )
        prompts.append(CocoPrompt(caption, image_id, captions.file_names[image_id]))
    return prompts


def write_subset(
    captions: CocoCaptions,
    out: Path,
    *,
    images: Path | None = None,
    num: int = COCO_SIZE,
    seed: int = COCO_SEED,
) -> None:
    """Sample, and write the subset as Parquet, atomically; says on stderr how far it is.

    The columns are prompt, image_id, file_name and, if images are given, image: the bytes of the
    file. The schema's metadata has a JSON object, `provenance`. Equal input gives equal bytes.

    images: the folder of all the images.
    Raises PromptError, if an image is missing before anything is written, or OSError.
    """
    # The prompts are for machines that only draw too, which may not have pyarrow.
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts = sample_captions(captions, num, seed)
    fields = [("prompt", pa.string()), ("image_id", pa.int64()), ("file_name", pa.string())]
    if images is not None:
        _check_images(images, prompts)
        fields.append(("image", pa.binary()))
    provenance = {
        "tool": "crdiff-search",
        "version": version("crdiff-search"),
        "source": captions.path.name,
        "source_sha256": captions.sha256,
        "num": num,
        "seed": seed,
        "sampling": _SAMPLING,
    }
    schema = pa.schema(fields, metadata={"provenance": json.dumps(provenance)})
    # JPEG does not get smaller.
    compression = {name: "none" if name == "image" else "snappy" for name in schema.names}
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    told = time.monotonic()
    try:
        with pq.ParquetWriter(draft, schema, compression=compression) as writer:
            for start in range(0, num, _ROWS):
                rows = prompts[start : start + _ROWS]
                columns: dict[str, list[object]] = {
                    "prompt": [row.text for row in rows],
                    "image_id": [row.image_id for row in rows],
                    "file_name": [row.file_name for row in rows],
                }
                if images is not None:
                    columns["image"] = [(images / row.file_name).read_bytes() for row in rows]
                writer.write_table(pa.table(columns, schema))
                if time.monotonic() - told >= _TELL_EVERY_S:
                    told = time.monotonic()
                    print(f"{start + len(rows)} of {num} written", file=sys.stderr, flush=True)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _check_images(folder: Path, prompts: Sequence[CocoPrompt]) -> None:
    missing = [row.file_name for row in prompts if not (folder / row.file_name).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PromptError(
            f"{folder}: lacks {missing[0]}{others} of {len(prompts)} images: give the folder that "
            "val2014.zip unpacks to"
        )
