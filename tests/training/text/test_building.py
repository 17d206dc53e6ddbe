"""Text towers: padding changes nothing, a checkpoint builds them again, what does not fit is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embedserve.errors import InvalidField, NotFound
from tests.training.text.examples import WORDS, hugging_face_folder, word_rules, word_tokenizer
from training.open_clip_models import create
from training.text import TextRules, TextTower, build_text, rebuild_text
from training.text.open_clip import text_of


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return hugging_face_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=["transformer/2x48", "hf:"])
def tower(request: pytest.FixtureRequest, bert: Path) -> TextTower:
    torch.manual_seed(0)
    return build_text(request.param if request.param != "hf:" else f"hf:{bert}").eval()


def vectors(tower: TextTower, tokens: list[list[int]]) -> Tensor:
    with torch.no_grad():
        found: Tensor = tower(torch.tensor(tokens))
    return found


def test_padding_at_the_end_does_not_change_a_vector(tower: TextTower) -> None:
    short, long = tower.rules.encode(["red hat", "a red shoe 1 2 3"])
    assert len(short) < len(long)
    pad = tower.rules.pad_id
    padded = vectors(tower, [[*short, *[pad] * (len(long) - len(short))], long])
    assert padded.shape == (2, tower.dim)
    torch.testing.assert_close(padded[:1], vectors(tower, [short]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded[1:], vectors(tower, [long]), rtol=1e-5, atol=1e-6)


def test_what_a_checkpoint_carries_builds_the_same_tower_without_its_files(tower: TextTower) -> None:
    again = rebuild_text(tower.carried()).eval()
    again.load_state_dict(tower.state_dict())
    assert (again.name, again.dim, again.trained, again.rules) == (
        tower.name,
        tower.dim,
        tower.trained,
        tower.rules,
    )
    tokens = tower.rules.encode(["a blue hat"])
    assert torch.equal(vectors(again, tokens), vectors(tower, tokens))


def test_a_text_longer_than_the_context_is_cut_and_keeps_its_end(tower: TextTower) -> None:
    [ids], [end] = tower.rules.encode(["red " * 200]), tower.rules.encode(["red"])
    assert len(ids) == tower.rules.context_length
    assert ids[-1] == end[-1]
    assert vectors(tower, [ids]).isfinite().all()


def test_an_encoder_of_transformers_is_the_mean_over_its_real_tokens(bert: Path) -> None:
    import transformers

    tower = build_text(f"hf:{bert}").eval()
    assert tower.trained
    assert (tower.dim, tower.rules.context_length) == (32, 24)
    model: Any = transformers.AutoModel.from_pretrained(bert).eval()
    tokens, mask = torch.tensor([[2, 4, 8, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(tower(tokens), hidden[:, :4].mean(1))
    assert not [name for name, _ in tower.named_parameters() if "pooler" in name], "it would have no gradient"


def test_roberta_keeps_two_positions_for_itself(tmp_path: Path) -> None:
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=26,
        pad_token_id=0,
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_max_length=512,
    ).save_pretrained(tmp_path)
    tower = build_text(f"hf:{tmp_path}").eval()
    assert tower.rules.context_length == 24
    assert vectors(tower, tower.rules.encode(["red " * 100])).shape == (1, 32)


def test_a_side_of_an_open_clip_model_gives_its_own_vectors() -> None:
    torch.manual_seed(0)
    model = create("ViT-S-32").eval()
    tower = text_of(model, "ViT-S-32", trained=False)
    ids = tower.rules.encode(["a red shoe"])
    whole = torch.zeros(1, 77, dtype=torch.int64)
    whole[0, : len(ids[0])] = torch.tensor(ids[0])
    with torch.no_grad():
        torch.testing.assert_close(vectors(tower, ids), model.encode_text(whole), rtol=1e-4, atol=1e-5)


def test_rules_are_plain_values_and_come_back() -> None:
    rules = word_rules(padding="context", cleaning="clip")
    assert TextRules.from_json(rules.as_json()) == rules
    assert word_rules().unknown_id == WORDS.index("[UNK]")
    assert build_text("transformer/1x32").rules.unknown_id == -1, "bytes spell everything"


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clip", "text='clip' is unknown; give 'sentences', 'open_clip:ViT-B-32'"),
        ("transformer/0x64", "give 1 layer or more"),
        ("transformer/2x30", "multiple of 16"),
        ("open_clip:ViT-B-33", "did you mean 'ViT-B-32'"),
    ],
)
def test_an_unknown_tower_is_told_what_there_is(name: str, said: str) -> None:
    with pytest.raises(InvalidField, match=said):
        build_text(name)


def test_a_folder_needs_a_model_and_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"there is no folder '.*nowhere' with a config\.json"):
        build_text(f"hf:{tmp_path / 'nowhere'}")
    folder = hugging_face_folder(tmp_path / "without", tokenizer=False)
    with pytest.raises(InvalidField, match=r"the folder has no tokenizer .*tokenizer\.save_pretrained"):
        build_text(f"hf:{folder}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidField, match=r"cannot be loaded by transformers|tokenizer"):
        build_text(f"hf:{folder}")
    (folder / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(InvalidField, match=r"cannot be loaded by transformers: .*no such model"):
        build_text(f"hf:{folder}")


def test_a_decoder_is_no_encoder_of_texts(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, num_decoder_layers=1
    )
    transformers.T5Model(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_max_length=24,
    ).save_pretrained(tmp_path)
    with pytest.raises(InvalidField, match="is a t5 model, which gives no vector for a token"):
        build_text(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("transformer/1x32", "has random weights"),
        ("sentences", "brings its own"),
        ("hf:folder", "brings its own"),
    ],
)
def test_weights_to_start_from_are_for_open_clip_alone(name: str, said: str) -> None:
    with pytest.raises(InvalidField, match=f"text_start is for text towers of open_clip; '{name}' {said}"):
        build_text(name, start="laion2b")


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InvalidField, match=r"other\.pt' does not fit open_clip's 'ViT-S-32'") as told:
        build_text("open_clip:ViT-S-32", start=str(tmp_path / "other.pt"))
    assert told.value.param == "text_start"
    with pytest.raises(
        NotFound, match="'nowhere' is neither a file nor weights that open_clip has"
    ) as missing:
        build_text("open_clip:ViT-S-32", start="nowhere")
    assert missing.value.param == "text_start"
