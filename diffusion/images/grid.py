"""Contact sheets: pictures in rows with their captions below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_BACKGROUND = (255, 255, 255)
_INK = (45, 45, 48)
_MAX_LINES = 4


def labelled_grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Lay out pictures row by row with their captions, wrapped and centred, below them.

    Cells are as large as the largest picture; captions beyond four lines end in an ellipsis.
    Raises ValueError when the counts differ, or for no pictures or columns.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"{len(images)} pictures and {len(labels)} labels: equal, positive numbers are needed")
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    cell_width, cell_height = max(image.width for image in images), max(image.height for image in images)
    font_size = max(11, cell_width // 17)
    font = ImageFont.load_default(size=font_size)
    gap, line_height = max(8, cell_width // 16), round(font_size * 1.3)
    wrapped = [_wrap(label, font, cell_width) for label in labels]
    line_counts = [max(len(lines) for lines in wrapped[row * columns : (row + 1) * columns]) for row in range(rows)]
    row_heights = [cell_height + gap // 2 + count * line_height for count in line_counts]
    sheet = Image.new(
        "RGB", (columns * cell_width + (columns + 1) * gap, sum(row_heights) + (rows + 1) * gap), _BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped)):
        row, column = divmod(index, columns)
        left, top = gap + column * (cell_width + gap), gap + sum(row_heights[:row]) + row * gap
        sheet.paste(image.convert("RGB"), (left + (cell_width - image.width) // 2, top + cell_height - image.height))
        for line_number, line in enumerate(lines):
            position = (left + cell_width / 2, top + cell_height + gap // 2 + line_number * line_height)
            draw.text(position, line, font=font, fill=_INK, anchor="ma")
    return sheet


def _wrap(label: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break at spaces, and inside words wider than the cell; at most four lines."""
    lines = [""]
    for word in label.split():
        for part in _split_word(word, font, width):
            candidate = f"{lines[-1]} {part}".strip()
            if font.getlength(candidate) <= width:
                lines[-1] = candidate
            else:
                lines.append(part)
        if len(lines) > _MAX_LINES:
            break
    if len(lines) <= _MAX_LINES:
        return lines
    last = lines[_MAX_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: _MAX_LINES - 1], last.rstrip(" ,;:") + "…"]


def _split_word(word: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    parts = [""]
    for char in word:
        if parts[-1] and font.getlength(parts[-1] + char) > width:
            parts.append("")
        parts[-1] += char
    return parts
