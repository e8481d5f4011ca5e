"""Pictures of results for TensorBoard, drawn with Pillow: uint8 arrays, (height, width, 3)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MOST_NAMED = 30  # classes; of more, names and counts would be too small to read
_LONGEST_NAME = 160  # pixels
_FONT_SIZE, _MARGIN = 13, 6
_DARK, _GREY = (30, 30, 30), (200, 200, 200)
_LIGHT, _FULL = (255, 255, 255), (8, 48, 107)  # shares of 0 and 1

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def confusion_picture(confusion: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """A confusion matrix: a row is a true class, a column what was predicted.

    The shade of a cell is its share of its row, so a rare class is as visible as a frequent one. Up to 30 classes the
    cells have their counts, and rows and columns their names; a name that is too long ends in an ellipsis.

    Args:
      confusion: counts, (classes, classes).
      labels: the names of the classes.

    Returns:
      uint8 (height, width, 3).
    """
    counts, num = np.asarray(confusion), len(labels)
    font = ImageFont.load_default(_FONT_SIZE)
    is_named = num <= _MOST_NAMED
    names = [_fitted(" ".join(label.split()), font) for label in labels] if is_named else []
    texts = [f"{int(count):,}" for count in counts.flat] if is_named else []
    widest = max([_width(text, font) for text in texts], default=0)
    cell = max(40 if num <= 12 else 24, widest + 2 * _MARGIN) if is_named else max(1, 600 // num)
    line = _FONT_SIZE + 2 * _MARGIN
    side = max([_width(name, font) for name in names], default=0) + 2 * _MARGIN
    left, top = line + side, line + side  # an axis and the names of its classes
    size = cell * num + 1
    picture = Image.new("RGB", (left + size + _MARGIN, top + size + _MARGIN), _LIGHT)
    _draw_cells(picture, counts, texts, font, (left, top), cell)
    _draw_names(picture, names, font, (left, top), cell)
    _draw_axis(picture, "predicted", font, (left + size // 2, line // 2), upright=False)
    _draw_axis(picture, "true", font, (line // 2, top + size // 2), upright=True)
    return np.asarray(picture, dtype=np.uint8)


def _draw_cells(
    picture: Image.Image, counts: np.ndarray, texts: Sequence[str], font: Font, corner: tuple[int, int], cell: int
) -> None:
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    light, full = np.array(_LIGHT), np.array(_FULL)
    shades = np.rint(light + shares[..., np.newaxis] * (full - light)).astype(np.uint8)
    picture.paste(Image.fromarray(shades.repeat(cell, axis=0).repeat(cell, axis=1)), corner)
    left, top = corner
    draw, end = ImageDraw.Draw(picture), len(counts) * cell
    draw.rectangle((left - 1, top - 1, left + end, top + end), outline=_GREY)
    for number in range(1, len(counts)) if texts else ():
        at = number * cell
        draw.line((left + at, top, left + at, top + end), _GREY)
        draw.line((left, top + at, left + end, top + at), _GREY)
    for index, text in enumerate(texts):
        row, column = divmod(index, len(counts))
        colour = _LIGHT if shares[row, column] > 0.5 else _DARK
        draw.text((left + (column + 0.5) * cell, top + (row + 0.5) * cell), text, colour, font, anchor="mm")


def _draw_names(picture: Image.Image, names: Sequence[str], font: Font, corner: tuple[int, int], cell: int) -> None:
    """Of the rows to their left, of the columns above them, upright so that long ones have room."""
    left, top = corner
    draw = ImageDraw.Draw(picture)
    for number, name in enumerate(names):
        middle = number * cell + cell // 2
        draw.text((left - _MARGIN, top + middle), name, _DARK, font, anchor="rm")
        turned = _upright(name, font)
        picture.paste(turned, (left + middle - turned.width // 2, top - _MARGIN - turned.height))


def _draw_axis(picture: Image.Image, name: str, font: Font, middle: tuple[int, int], upright: bool) -> None:
    if not upright:
        ImageDraw.Draw(picture).text(middle, name, _DARK, font, anchor="mm")
        return
    turned = _upright(name, font)
    picture.paste(turned, (middle[0] - turned.width // 2, middle[1] - turned.height // 2))


def _upright(text: str, font: Font) -> Image.Image:
    """A text that reads from the bottom up."""
    size = (max(1, _width(text, font)), _FONT_SIZE + 4)
    drawn = Image.new("RGB", size, _LIGHT)
    ImageDraw.Draw(drawn).text((0, size[1] // 2), text, _DARK, font, anchor="lm")
    return drawn.transpose(Image.Transpose.ROTATE_90)


def _fitted(name: str, font: Font) -> str:
    """A name, or as much of it as fits."""
    if _width(name, font) <= _LONGEST_NAME:
        return name
    kept = next(
        n for n in range(min(len(name), _LONGEST_NAME), -1, -1) if _width(name[:n] + "...", font) <= _LONGEST_NAME
    )
    return name[:kept].rstrip() + "..."


def _width(text: str, font: Font) -> int:
    return int(np.ceil(font.getlength(text)))
