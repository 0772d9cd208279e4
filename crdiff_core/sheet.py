"""One picture of several, in labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 8
"""Pixels between pictures and around them."""

LINE = 18
"""Pixels of a line of text."""

# Pictures with a shorter side than this are enlarged.
_LEGIBLE = 192
_FONT_SIZE = 14
# More letters than any picture is wide.
_LONGEST = 256


@dataclass(frozen=True)
class Row:
    """Pictures of one size, side by side, below a caption and a label for each (or none)."""

    caption: str
    pictures: Sequence[Image.Image]
    labels: Sequence[str] = ()


def legible_zoom(height: int, width: int) -> int:
    """Return how many pixels, each way, one pixel of such a picture should become."""
    return max(1, round(_LEGIBLE / min(height, width)))


def arrange(rows: Sequence[Row], zoom: int, titles: Sequence[str] = ()) -> Image.Image:
    """Put the rows below each other, their pictures nearest-neighbour enlarged.

    titles: of the columns. A title or label too long for its column is cut short, a caption too
    long for the sheet goes on in another line.
    """
    width, height = (side * zoom for side in rows[0].pictures[0].size)
    num_columns = len(rows[0].pictures)
    font = ImageFont.load_default(_FONT_SIZE)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def fits(text: str, room: int) -> bool:
        return measure.textlength(text, font) <= room

    room = num_columns * (width + GAP) - GAP
    captions = [_wrap(row.caption, lambda text: fits(text, room)) for row in rows]
    num_lines = bool(titles) + sum(map(len, captions)) + sum(bool(row.labels) for row in rows)
    sheet = Image.new(
        "RGB", (room + 2 * GAP, GAP + LINE * num_lines + len(rows) * (height + 2 * GAP)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    top = GAP

    def write(texts: Sequence[str], color: str) -> None:
        nonlocal top
        for column, text in enumerate(texts):
            text = _shorten(text, lambda part: fits(part, width))
            pen.text((GAP + column * (width + GAP), top), text, color, font)
        top += LINE if texts else 0

    write(titles, "black")
    for row, caption in zip(rows, captions, strict=True):
        top += GAP
        for line in caption:
            pen.text((GAP, top), line, "dimgray", font)
            top += LINE
        write(row.labels, "black")
        for column, picture in enumerate(row.pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (GAP + column * (width + GAP), top))
        top += height + GAP
    return sheet


def _wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break a text between words into lines that fit, one word at least in each."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Return one line of it that fits, with an ellipsis where that is not all."""
    whole = " ".join(text.split())
    line = whole[:_LONGEST]
    if line == whole and fits(line):
        return line
    while line and not fits(f"{line}…"):
        line = line[:-1]
    return f"{line.rstrip()}…"
