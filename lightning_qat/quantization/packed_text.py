"""Compressed bytes as a text, for checkpoints.

A text needs no place of its own in the file, which costs a tensor some 300 bytes; and ``weights_only`` loads no bytes.
"""

from __future__ import annotations

import base64
import zlib

from lightning_qat.quantization.errors import ConfigurationError


def pack_text(data: bytes) -> str:
    """Return bytes as a compressed text.

    Example:
        >>> unpack_text(pack_text(b"abc" * 1000), 3000) == b"abc" * 1000
        True
    """
    return base64.b85encode(zlib.compress(data)).decode()


def unpack_text(text: str, limit: int) -> bytes:
    """Return the bytes of :func:`pack_text`.

    Args:
        text: the text.
        limit: number of bytes at most: a damaged or hostile text might be that of any number.

    Raises:
        ConfigurationError: the text is damaged, or holds more.
    """
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b85decode(text), limit)
    except (ValueError, zlib.error) as error:
        raise ConfigurationError(f"a packed text in the checkpoint is damaged ({error}): use another one.") from error
    if not unpacker.eof:
        raise ConfigurationError("a packed text in the checkpoint is cut off or too long: use another checkpoint.")
    return data
