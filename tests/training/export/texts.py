"""Texts that break tokenizers, and small tokenizers made of them."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

NASTY = [
    "",
    " \t\n\u3000\x1c",
    "a photo of a cat",
    "A Photo, of a CAT!!",
    "it's we'll I'D they've 'tis it'ſ",
    "0 1234567890 3.14 ½ ٣ Ⅷ ① 10⁵",
    "un·be-liev_able __init__ snake_case",
    "supercalifragilisticexpialidocious" * 40,
    "word " * 200,
    "!!!a!!! ?!?!",
    # HTML, once and twice, and what only looks like it
    "&lt;b&gt; &amp;amp;lt; &#x27;&#39; &copy &notanentity; AT&T &#0; &#xD800; &#x110000;",
    # what ftfy repairs
    "âœ” No problems; itâ€™s fine, schÃ¶n, â€œquotedâ€\x9d",
    "“curly” ‘quotes’ ﬁnd ﬂuﬀy ＦＵＬＬ　ｗｉｄｔｈ",
    "\x1b[31mred\x1b[0m \ufeffbom soft\u00adhyphen zero\u200bwidth",
    "nul\0nul bell\x07 del\x7f next\x85line\u2028separator",
    # scripts
    "Ünïcödé Straße ǅ İstanbul ıI ΟΔΥΣΣΕΥΣ ΣΑΣ",
    "привет мир שלום עולם مرحبا بالعالم नमस्ते दुनिया",
    "你好，世界 こんにちは世界 안녕하세요 สวัสดีชาวโลก ሰላም",
    "e\u0301 vs é, q\u0307\u0323 q\u0323\u0307, \u0345 alone, \u1ab0",
    "\U0002ebf0\U000323b0 new Chinese, \U00010d50 Garay, \u1c89",
    "🐈 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪 ❤️ ☃",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "\ue000 private \U0010ffff last \ufdd0 \ufffd",
    # special tokens, typed
    "<|endoftext|> <|startoftext|> </s> <s> <pad> <unk> [CLS] [SEP] [PAD] <eos> <bos>",
    "<start_of_text> and <end_of_text>",
    "<START_OF_TEXT><end_of_text> !<end_of_text><start_of_text> a<end_of_text>b <ſtart_of_text>",
    "<start_of_tex t> <end_of_text",
    "▁ lower one eighth block ▁▁",
]

ANY_TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [
            *"aeſsİΣσ'!<>_&;#x09 \n\0\x1c\u0345\u0301é中🐈\u200d\ufeff▁",
            *("'s", "&amp;", "&lt;", "â€™", "Ã©", "ﬁ"),
            *("<start_of_text>", "<end_of_text>", "</s>", "[SEP]", "<|endoftext|>"),
        ]
    ),
    max_size=20,
).map("".join)
"""Anything, and mixtures of what is known to be awkward."""

SEEDED = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def sentencepiece_like(folder: Path) -> Path:
    """A unigram tokenizer as SigLIP's: `</s>` ends and fills up, nothing begins."""
    built = tokenizers.Tokenizer(models.Unigram())
    built.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    built.train_from_iterator([text[:200] for text in NASTY] * 3, trainer)
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(folder)
    return folder


def sentencepiece(folder: Path) -> Path:
    """A sentencepiece model as SigLIP's, as Hugging Face keeps it."""
    import sentencepiece as library
    from transformers import SiglipTokenizer

    lines = (" ".join(text.split())[:200] for text in NASTY * 3)
    library.SentencePieceTrainer.train(
        sentence_iterator=(line.replace("\0", "") for line in lines if line),
        model_prefix=str(folder / "spiece"),
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)
    return folder


def wordpiece(folder: Path) -> Path:
    """A tokenizer as BERT's, for CLIPA."""
    built = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer()
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    built.train_from_iterator([text[:200] for text in NASTY], trainer)
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)
    return folder


def byte_pairs(folder: Path) -> Path:
    """Hugging Face's own CLIP tokenizer, with open_clip's vocabulary under OpenAI's names."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    simple = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(name, name): token for name, token in simple.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks), model_max_length=77).save_pretrained(
        folder
    )
    return folder
