"""A library's tokenizer as the text of a tokenizer.json that gives the same ids, token for token.

Hugging Face tokenizers are in that format already. open_clip's own byte-pair encoding is rebuilt in it: its
cleaning stays behind as the name of a rule (`embedserve.cleaning`), everything after it is expressed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import regex
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from embedserve.cleaning import Cleaning
from embedserve.errors import InvalidField

__all__ = ["Tokens", "from_hugging_face", "from_open_clip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """How texts become ids."""

    tokenizer: str
    """The text of tokenizer.json."""
    context_length: int
    pad_id: int
    cleaning: Cleaning = "none"
    reference: Callable[[Sequence[str]], list[list[int]]]
    """The library's own ids, cut to the context, special tokens included, padding left out."""


def from_open_clip(tokenizer: Any) -> Tokens:
    """What `open_clip.get_tokenizer` returned.

    Raises:
        InvalidField: A tokenizer that draws random tokens or works in no way that a tokenizer.json can say.
    """
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        return _from_simple(tokenizer)
    if isinstance(tokenizer, SigLipTokenizer):
        return from_hugging_face(tokenizer.tokenizer, tokenizer.context_length, cleaning="canonicalize")
    if not isinstance(tokenizer, HFTokenizer) or tokenizer.tokenizer_mode:
        mode = getattr(tokenizer, "tokenizer_mode", "")
        raise InvalidField(
            f"open_clip's tokenizer {type(tokenizer).__name__}{f' in mode {mode!r}' if mode else ''} cannot "
            "be written as a tokenizer.json; those of CLIP, SigLIP, CLIPA and Hugging Face text towers can.",
            param="source",
        )
    return from_hugging_face(
        tokenizer.tokenizer,
        tokenizer.context_length,
        cleaning=_rule(tokenizer.clean_fn),
        without_separator=tokenizer.strip_sep_token,
    )


def from_hugging_face(
    tokenizer: Any, context_length: int, *, cleaning: Cleaning = "none", without_separator: bool = False
) -> Tokens:
    """A tokenizer of transformers that is backed by a tokenizer.json.

    Args:
        tokenizer: A `PreTrainedTokenizerBase`.
        context_length: Where texts are cut.
        cleaning: What the caller's library does to texts before.
        without_separator: The separator's id becomes 0, as open_clip does for CLIPA.

    Raises:
        InvalidField: It is not backed by a tokenizer.json, has no padding token, or works from the left.
    """
    from embedserve.cleaning import clean

    name = type(tokenizer).__name__
    if name == "SiglipTokenizer" and cleaning == "none" and not without_separator:
        return _from_siglip(tokenizer, context_length)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidField(
            f"{name} runs in Python and has no tokenizer.json; save a fast one beside the model "
            "(`AutoTokenizer.from_pretrained(…).save_pretrained(…)` with `tokenizers` support).",
            param="source",
        )
    if tokenizer.pad_token_id is None:
        raise InvalidField(
            f"{name} names no padding token; set pad_token in tokenizer_config.json.", param="source"
        )
    for what, side in (("cuts", tokenizer.truncation_side), ("fills up", tokenizer.padding_side)):
        if side != "right":
            raise InvalidField(
                f"{name} {what} texts on the {side}; serving does so on the right. Set padding_side and "
                "truncation_side in tokenizer_config.json to 'right' if the encoder was trained so.",
                param="source",
            )
    document = json.loads(backend.to_str())
    document["truncation"] = document["padding"] = None  # left over from whatever was encoded last
    if without_separator:
        _drop_separator(document, tokenizer.sep_token)
    separator = tokenizer.sep_token_id if without_separator else None

    def reference(texts: Sequence[str]) -> list[list[int]]:
        cleaned = [clean(text, cleaning) for text in texts]
        rows = tokenizer(cleaned, max_length=context_length, truncation=True)["input_ids"]
        return [[0 if token == separator else token for token in row] for row in rows]

    return Tokens(
        tokenizer=json.dumps(document, ensure_ascii=False),
        context_length=context_length,
        pad_id=tokenizer.pad_token_id,
        cleaning=cleaning,
        reference=reference,
    )


def _from_siglip(tokenizer: Any, context_length: int) -> Tokens:
    """transformers runs SigLIP's tokenizer in Python, on sentencepiece.

    Differences that remain: a typed `</s>` or `<unk>` is text here, and sentencepiece normalises some
    sequences of rare combining characters otherwise (in 4 of 3,000 texts of random characters).
    """
    from transformers.convert_slow_tokenizer import SpmConverter

    if not tokenizer.do_lower_case:
        raise InvalidField(
            "This SigLIP tokenizer keeps upper case, which no rule of a bundle says. Set do_lower_case in "
            "tokenizer_config.json if the encoder was trained on lower case.",
            param="source",
        )
    converter: Any = SpmConverter  # not annotated
    built: tokenizers.Tokenizer = converter(tokenizer).converted()
    end = tokenizer.eos_token
    built.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )

    def reference(texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = tokenizer(list(texts), max_length=context_length, truncation=True)[
            "input_ids"
        ]
        return rows

    return Tokens(
        tokenizer=built.to_str(),
        context_length=context_length,
        pad_id=tokenizer.pad_token_id,
        cleaning="siglip",
        reference=reference,
    )


def _drop_separator(document: dict[str, Any], separator: str) -> None:
    """Gives the separator the id 0 wherever it has one: in the vocabulary, typed by a user, at the end."""
    document["model"]["vocab"][separator] = 0
    for token in document["added_tokens"]:
        if token["content"] == separator:
            token["id"] = 0
    post = document["post_processor"]
    if post["type"] == "TemplateProcessing":
        post["special_tokens"][separator]["ids"] = [0]
    else:  # BertProcessing
        post["sep"] = [separator, 0]


def _rule(clean_fn: Callable[[str], str]) -> Cleaning:
    from open_clip.tokenizer import get_clean_fn

    rules: tuple[Cleaning, ...] = ("whitespace", "lower", "canonicalize")
    for rule in rules:
        if clean_fn is get_clean_fn(rule):
            return rule
    raise InvalidField(f"open_clip cleans texts by an unknown rule ({clean_fn!r}).", param="source")


# --- open_clip's own byte-pair encoding ----------------------------------------------------------------


def _from_simple(tokenizer: Any) -> Tokens:
    if tokenizer.reduction_fn is not None:
        raise InvalidField(
            "This open_clip tokenizer leaves tokens out at random (reduction_mask); a served text must "
            "always give the same ids. Remove reduction_mask from tokenizer_kwargs.",
            param="source",
        )
    start, end, *more = (tokenizer.decoder[token] for token in tokenizer.all_special_ids)
    vocabulary = dict(tokenizer.encoder)
    merges = list(tokenizer.bpe_ranks)
    plain = models.BPE(dict(vocabulary), merges, end_of_word_suffix="</w>")
    ends = (token for name, token in tokenizer.encoder.items() if name.endswith("</w>"))
    for special in (start, end, *more):
        pieces = [token.value for token in plain.tokenize(special)]
        merges += _spelled_out(special, pieces, vocabulary, ends)
    built = tokenizers.Tokenizer(plain)
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_pattern((start, end, *more))), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, tokenizer.sot_token_id), (end, tokenizer.eot_token_id)],
    )
    document = json.loads(built.to_str())
    document["model"] |= {"vocab": vocabulary, "merges": merges}  # the library would write borrowed ids once

    def reference(texts: Sequence[str]) -> list[list[int]]:
        # Filled up with zeros. A real 0 ("!" inside a word) never comes last: that is the end token.
        return [
            row[: max(i for i, token in enumerate(row) if token) + 1]
            for row in tokenizer(list(texts)).tolist()
        ]

    return Tokens(
        tokenizer=json.dumps(document, ensure_ascii=False),
        context_length=tokenizer.context_length,
        pad_id=0,
        cleaning=_rule(tokenizer.clean_fn),
        reference=reference,
    )


def _spelled_out(
    special: str, pieces: Sequence[str], vocabulary: dict[str, int], ends: Iterator[int]
) -> list[tuple[str, str]]:
    """Merges that make a special token out of the pieces it falls into when a user types it.

    open_clip recognises a typed `<end_of_text>` only where a word may begin: after "!" it is punctuation,
    since "!<" is one word. An added token of the Hugging Face format is recognised everywhere, so it cannot
    stand for that. Merges can: only a recognised special token is a single word of signs and letters.

    The merged string takes the special token's id. Those on the way there need an id too and are never where
    it ends; they borrow, from `ends`, the ids of tokens that end a word, which no merge begins with.
    """
    merges, left = [], pieces[0]
    for piece in pieces[1:]:
        merges.append((left, piece))
        left += piece
        vocabulary[left] = next(ends)
    vocabulary[left] = vocabulary.pop(special)
    return merges


@functools.cache
def _pattern(specials: tuple[str, ...]) -> str:
    """open_clip's pattern for words, with every class of characters written out.

    What is a letter differs between versions of Unicode: the tokenizers library's regular expressions lack
    17,000 characters that are letters for Python's `regex`, most of them Chinese. And open_clip ignores case,
    which makes "ſ" an "s" and U+0345 neither letter nor sign.
    """
    everything = "".join(map(chr, range(0x110000)))
    words = [*specials, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
    cases = {sign: _class(regex.escape(sign), everything) for sign in sorted(set("".join(words)))}
    return "|".join(
        [
            *("".join(cases[sign] for sign in word) for word in words),
            _class(r"[\p{L}]", everything) + "+",
            _class(r"[\p{N}]", everything),
            _class(r"[^\s\p{L}\p{N}]", everything) + "+",
        ]
    )


def _class(pattern: str, everything: str) -> str:
    """The characters that `pattern` matches when case is ignored, as ranges."""
    spans = (match.span() for match in regex.finditer(f"(?:{pattern})+", everything, regex.IGNORECASE))
    ranges = (
        f"\\x{{{first:x}}}" + (f"-\\x{{{after - 1:x}}}" if after - first > 1 else "")
        for first, after in spans
    )
    return f"[{''.join(ranges)}]"
