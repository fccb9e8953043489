"""Drawings used as product photos, so that the repository need not contain images."""

from __future__ import annotations

import io
import math
import random

from PIL import Image, ImageDraw, ImageOps

WIDTH, HEIGHT = 1600, 1200
_GROUND = 980
_TALL = 720
_STEPS = 40


def draw_photo(subject: str) -> bytes:
    """A JPEG that shows a vase-like object. The same ``subject`` always gives the same picture."""
    dice = random.Random(subject)
    hue = dice.randrange(360)
    picture = _backdrop((hue + 150) % 360)
    _draw_shadow(picture)
    outline = _outline(dice)
    _draw_body(picture, outline, hue)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()


def _backdrop(hue: int) -> Image.Image:
    shades = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
    return ImageOps.colorize(shades, f"hsl({hue}, 30%, 92%)", f"hsl({hue}, 25%, 70%)")


def _draw_shadow(picture: Image.Image) -> None:
    box = (WIDTH // 2 - 420, _GROUND - 60, WIDTH // 2 + 420, _GROUND + 60)
    ImageDraw.Draw(picture, "RGBA").ellipse(box, fill=(0, 0, 0, 50))


def _outline(dice: random.Random) -> list[tuple[float, float]]:
    """Points of half the object's width and its vertical position, from the foot up, in pixels."""
    foot, belly, neck = dice.uniform(130, 240), dice.uniform(220, 380), dice.uniform(70, 240)
    tall = dice.uniform(0.6, 1.0) * _TALL
    points = []
    for step in range(_STEPS + 1):
        up = step / _STEPS
        bulge = math.sin(math.pi * up**0.8)
        half = foot + (neck - foot) * up + (belly - (foot + neck) / 2) * bulge
        points.append((half, _GROUND - up * tall))
    return points


def _draw_body(picture: Image.Image, outline: list[tuple[float, float]], hue: int) -> None:
    brush = ImageDraw.Draw(picture)
    middle = WIDTH / 2
    # Shaded from dark to light: each layer is narrower than the last, and further to the right.
    for layer in range(12):
        share, shift = 1 - layer / 13, layer * 7
        left = [(middle + shift - half * share, y) for half, y in outline]
        right = [(middle + shift + half * share, y) for half, y in reversed(outline)]
        brush.polygon(left + right, fill=f"hsl({hue}, 45%, {30 + 3 * layer}%)")
    top_half, top = outline[-1]
    rim = (middle - top_half, top - 22, middle + top_half, top + 22)
    brush.ellipse(rim, fill=f"hsl({hue}, 45%, 20%)")
