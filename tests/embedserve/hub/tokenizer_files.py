"""Tokenizers of the kinds that come with CLIP and SigLIP, small enough to be made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def clip(merges: int | None = None) -> str:
    """tokenizer.json as OpenAI's CLIP has it, with its first `merges` merges or all of them."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    pairs = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)[:merges]
    letters = list(theirs.byte_encoder.values())
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in pairs),
        START,
        END,
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, list(pairs), end_of_word_suffix="</w>", unk_token=END, continuing_subword_prefix=""
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=(END, vocabulary[END]),
        cls_token=(START, vocabulary[START]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


@cache
def siglip() -> str:
    """tokenizer.json as a T5 vocabulary has it: pieces of words, and </s> at the end, which pads as well."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    tokenizer.train_from_iterator(
        lines,
        trainers.UnigramTrainer(vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer.to_str()


def write(folder: Path, tokenizer: str, *, pad: str, context: int, names: tuple[str, ...]) -> None:
    """tokenizer.json with the settings beside it."""
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "model_max_length": context,
        "model_input_names": names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
