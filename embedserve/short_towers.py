"""Towers for a collection that keeps only the first numbers of each vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import EmbedServeError, InvalidField
from embedserve.prefix import shorten
from embedserve.towers import Picture, Towers

__all__ = ["Embeds", "ShortTowers"]

Vector = NDArray[np.float32]


class Embeds(Protocol):
    """What a collection needs of an encoder; `embedserve.towers.Towers` is one."""

    @property
    def dim(self) -> int: ...

    async def images(self, data: Sequence[bytes]) -> list[Vector | EmbedServeError]: ...

    async def pictures(self, data: Sequence[bytes]) -> list[Picture | EmbedServeError]: ...

    async def texts(self, texts: Sequence[str | list[int]]) -> list[Vector | EmbedServeError]: ...


class ShortTowers:
    """Towers whose vectors are cut to `dim` numbers and made unit length again.

    A vector whose first numbers are all zero is an InvalidField in its place.
    """

    def __init__(self, towers: Towers, dim: int) -> None:
        self._towers = towers
        self.dim = dim

    async def images(self, data: Sequence[bytes]) -> list[Vector | EmbedServeError]:
        return [self._short(one) for one in await self._towers.images(data)]

    async def texts(self, texts: Sequence[str | list[int]]) -> list[Vector | EmbedServeError]:
        return [self._short(one) for one in await self._towers.texts(texts)]

    async def pictures(self, data: Sequence[bytes]) -> list[Picture | EmbedServeError]:
        return [self._short_picture(one) for one in await self._towers.pictures(data)]

    def _short_picture(self, picture: Picture | EmbedServeError) -> Picture | EmbedServeError:
        if isinstance(picture, EmbedServeError):
            return picture
        short = self._short(picture.vector)
        return short if isinstance(short, EmbedServeError) else replace(picture, vector=short)

    def _short(self, vector: Vector | EmbedServeError) -> Vector | EmbedServeError:
        if isinstance(vector, EmbedServeError):
            return vector
        try:
            return shorten(vector, self.dim)
        except InvalidField as error:
            return error
