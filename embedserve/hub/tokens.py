"""What tokenizer files say beyond tokenizer.json: which id pads, how long a text may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from embedserve.errors import BundleError
from embedserve.hub.fetching import Repository

__all__ = ["context_length", "open_tokenizer", "optional_json", "pad_id", "tokenize_as"]

UNLIMITED = 100_000
"""tokenizer_config.json says 1e30 where nobody set a length."""


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Raises BundleError: not a tokenizer in the Hugging Face tokenizers format."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 -- the Rust binding raises bare Exception for every failure
        raise BundleError(f"'{path}' is not in the Hugging Face tokenizers format ({error}).") from None


def tokenize_as(
    path: Path, length: int, clean: Callable[[str], str] = lambda text: text
) -> Callable[[str], list[int]]:
    """How the repository's own code tokenizes: `clean`, then the file, cut to `length`, not padded."""
    tokenizer = open_tokenizer(path)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return lambda text: list(tokenizer.encode(clean(text)).ids)


def pad_id(
    repository: Repository, tokenizer: tokenizers.Tokenizer, folder: str = "", config: int | None = None
) -> int:
    """The id that fills a batch up.

    Said, in this order, by tokenizer_config.json, special_tokens_map.json, tokenizer.json and the model's own
    configuration (`config`), which for OpenAI's CLIP is wrong.

    Raises:
        BundleError: None of them says it, or it is no token.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = optional_json(repository, folder + name).get("pad_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is not None:
            found = tokenizer.token_to_id(token)
            if found is None:
                raise BundleError(
                    f"{repository.at}: '{name}' pads with {token!r}, which is no token of its tokenizer."
                )
            return int(found)
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    if config is not None:
        return config
    raise BundleError(
        f"{repository.at} does not say which token pads: looked for pad_token in tokenizer_config.json and "
        "special_tokens_map.json, padding in tokenizer.json and pad_token_id in config.json."
    )


def context_length(repository: Repository, text_config: Mapping[str, Any], default: int) -> int:
    """Of the position table, else of the tokenizer, else `default`, the architecture's own."""
    told = text_config.get("max_position_embeddings")
    if isinstance(told, int):
        return told
    limit = optional_json(repository, "tokenizer_config.json").get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and limit < UNLIMITED else default


def optional_json(repository: Repository, name: str) -> Mapping[str, Any]:
    return repository.json(name) if name in repository.files else {}
