"""Product photos: checks and stores uploads, and makes thumbnails of them.

All photos are files in the instance folder, which web server and worker share. This module does not
use the database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

from flask import current_app
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
SIZES = (480, 160)
"""Length of a thumbnail's longer side in pixels, the largest first."""
MAX_PIXELS = 40_000_000
"""Limit for uploads: a few kilobytes can decode to gigabytes. Photos of most cameras and phones are
smaller."""

_NAME_BYTES = 16
_QUALITY = 82


class NotAPhoto(ValueError):
    """The file is not a usable picture."""


@dataclasses.dataclass(frozen=True, slots=True)
class Thumbnail:
    """A thumbnail that was made."""

    width: int
    height: int
    bytes: int


def check(content: bytes) -> None:
    """Check that a file is a photo, by its header.

    The picture is not decoded here, because that may take long; the job does it.

    :raises NotAPhoto: when it is not a JPEG, PNG or WebP file, or has too many pixels.
    """
    with _opened(io.BytesIO(content)):
        pass


def keep(content: bytes) -> str:
    """Store an upload under a random name that cannot be guessed.

    :returns: the name.
    """
    name = secrets.token_hex(_NAME_BYTES)
    _write(_upload(name), content)
    return name


def make_thumbnails(name: str) -> Iterator[Thumbnail]:
    """Make the thumbnails of an upload, one after the other. Existing files are overwritten.

    The picture is rotated according to its EXIF orientation. All metadata is removed.

    :raises NotAPhoto: when the upload is damaged or not a photo.
    :raises FileNotFoundError: when the upload was removed.
    """
    picture = _read(_upload(name))
    for size in SIZES:
        picture.thumbnail((size, size))
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=_QUALITY)
        _write(thumbnail_folder() / thumbnail_name(name, size), data.getvalue())
        yield Thumbnail(*picture.size, bytes=data.tell())


def remove(name: str) -> None:
    """Remove an upload and its thumbnails, if they exist."""
    _upload(name).unlink(missing_ok=True)
    for size in SIZES:
        (thumbnail_folder() / thumbnail_name(name, size)).unlink(missing_ok=True)


def thumbnail_folder() -> Path:
    """The folder of the thumbnails. Uploads are stored elsewhere, because they are never served."""
    return Path(current_app.instance_path) / "photos" / "thumbnails"


def thumbnail_name(name: str, size: int) -> str:
    """The file name of a thumbnail."""
    return f"{name}-{size}.webp"


def _upload(name: str) -> Path:
    return Path(current_app.instance_path) / "photos" / "uploads" / name


def _write(path: Path, data: bytes) -> None:
    # Written to a temporary file first, so that an incomplete picture is never visible.
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path) -> Image.Image:
    """The picture without its metadata, scaled down to about the largest thumbnail."""
    with path.open("rb") as file, _opened(file) as picture:
        try:
            if picture.mode not in ("L", "RGB", "RGBA"):
                # Palette images would be scaled without smoothing, and WebP does not support CMYK.
                picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            # Scaled before it is rotated: a JPEG is then decoded at a fraction of its size.
            picture.thumbnail((SIZES[0], SIZES[0]))
            picture = ImageOps.exif_transpose(picture)
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise NotAPhoto(f"the picture is damaged: {error}") from error
    picture.info.clear()
    return picture


@contextlib.contextmanager
def _opened(file: io.BufferedIOBase) -> Iterator[Image.Image]:
    try:
        picture = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large() from error
    except (OSError, ValueError) as error:
        raise NotAPhoto("the file is not a JPEG, PNG or WebP picture") from error
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise _too_large()
        yield picture


def _too_large() -> NotAPhoto:
    return NotAPhoto(f"the picture has more than {MAX_PIXELS // 1_000_000} million pixels")
