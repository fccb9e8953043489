"""Photos of products: uploads are checked and kept, thumbnails are made from them.

All of them are files in the instance folder, which web server and worker share. Nothing here
knows the database.
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
"""Pixels of a thumbnail's longer side, the largest first."""
MAX_PIXELS = 40_000_000
"""A few kilobytes can unpack to gigabytes; cameras and phones stay below this."""

_NAME_BYTES = 16
_QUALITY = 82


class NotAPhoto(ValueError):
    """The file is no picture that can be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class Thumbnail:
    """One that was made."""

    width: int
    height: int
    bytes: int


def check(content: bytes) -> None:
    """Refuse what is no photo, by what its first bytes say.

    Nothing is unpacked here: that may take long, and is left to the job.

    :raises NotAPhoto: when it is none, or has too many pixels.
    """
    with _opened(io.BytesIO(content)):
        pass


def keep(content: bytes) -> str:
    """The name under which the upload is kept from now on; nobody can guess it."""
    name = secrets.token_hex(_NAME_BYTES)
    _write(_upload(name), content)
    return name


def make_thumbnails(name: str) -> Iterator[Thumbnail]:
    """Each thumbnail of an upload in turn, as a file. Made again, they are written over.

    Turned as the camera was held; place, time, camera and colour profile are left out.

    :raises NotAPhoto: when the upload is damaged, or none.
    :raises FileNotFoundError: when it was removed.
    """
    picture = _read(_upload(name))
    for size in SIZES:
        picture.thumbnail((size, size))
        data = io.BytesIO()
        picture.save(data, "WEBP", quality=_QUALITY)
        _write(thumbnail_folder() / thumbnail_name(name, size), data.getvalue())
        yield Thumbnail(*picture.size, bytes=data.tell())


def remove(name: str) -> None:
    """Remove the upload and its thumbnails, as far as they are there."""
    _upload(name).unlink(missing_ok=True)
    for size in SIZES:
        (thumbnail_folder() / thumbnail_name(name, size)).unlink(missing_ok=True)


def thumbnail_folder() -> Path:
    """Where thumbnails are. Uploads are elsewhere: they are never shown to anybody."""
    return Path(current_app.instance_path) / "photos" / "thumbnails"


def thumbnail_name(name: str, size: int) -> str:
    """The file name of a thumbnail."""
    return f"{name}-{size}.webp"


def _upload(name: str) -> Path:
    return Path(current_app.instance_path) / "photos" / "uploads" / name


def _write(path: Path, data: bytes) -> None:
    # A page that is shown meanwhile, or a job that is killed, never leaves half a picture.
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path) -> Image.Image:
    """The picture, not much larger than needed, without its metadata."""
    with path.open("rb") as file, _opened(file) as picture:
        try:
            if picture.mode not in ("L", "RGB", "RGBA"):
                # Palettes would be shrunk without smoothing, and CMYK is no colour of the web.
                picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            # Before it is turned: a JPEG is then read at a fraction of its size.
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
        raise NotAPhoto("the file is no JPEG, PNG or WebP picture") from error
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise _too_large()
        yield picture


def _too_large() -> NotAPhoto:
    return NotAPhoto(f"the picture has more than {MAX_PIXELS // 1_000_000} million pixels")
