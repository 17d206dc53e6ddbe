"""The official OpenAI client, unchanged, against a real server on a port."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.embedserve.api.requests import listening
from tests.embedserve.colours import axis


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[openai.OpenAI]:
    data = tmp_path_factory.mktemp("data")
    with (
        listening(data, tiny_folder, api_key=("secret:read",)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client,
    ):
        yield client


def test_its_default_encoding_works(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input="red")
    np.testing.assert_allclose(answer.data[0].embedding, axis("red"), atol=1e-6)
    assert answer.model == "tiny"
    assert answer.usage.prompt_tokens == 1


def test_floats_lists_and_token_arrays_work(client: openai.OpenAI) -> None:
    texts = client.embeddings.create(model="tiny", input=["red", "blue"], encoding_format="float")
    tokens = client.embeddings.create(model="tiny", input=[[2], [4]], encoding_format="base64")
    one = client.embeddings.create(model="tiny", input=[2, 4])
    expected = [axis("red"), axis("blue")]
    np.testing.assert_allclose([entry.embedding for entry in texts.data], expected, atol=1e-6)
    decoded = [np.frombuffer(base64.b64decode(str(e.embedding)), "<f4") for e in tokens.data]
    np.testing.assert_allclose(decoded, expected, atol=1e-6)
    np.testing.assert_allclose(one.data[0].embedding, sum(expected) / np.sqrt(2), atol=1e-6)


def test_dimensions_work(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input="red round", dimensions=4)
    np.testing.assert_allclose(answer.data[0].embedding, [1, 0, 0, 0], atol=1e-6)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "embedserve"


def test_errors_are_its_own_classes_with_our_message(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'"):
        client.embeddings.create(model="tny", input="red")
    with pytest.raises(openai.UnprocessableEntityError, match="this encoder has 8") as caught:
        client.embeddings.create(model="tiny", input="red", dimensions=99)
    assert caught.value.param == "dimensions"
    with pytest.raises(openai.AuthenticationError, match="not one of this server's"):
        client.with_options(api_key="wrong").embeddings.create(model="tiny", input="red")
