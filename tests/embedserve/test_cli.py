"""The command line: as a process where that matters, inside this one otherwise."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

import embedserve
from embedserve.cli import main

COMMAND = [sys.executable, "-m", "embedserve"]


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A real process, without a terminal."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60, **options
    )


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path) -> Command:
    """Runs a verb in this process on the tiny encoder; returns exit code, stdout and stderr."""

    def call(*arguments: str | Path, here: bool = True) -> tuple[int, str, str]:
        where = ["--data", str(tmp_path / "data"), "--encoder", str(tiny_folder)] if here else []
        try:
            code = main([*map(str, arguments), *where])
        except SystemExit as stop:  # wrong usage and --help
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("red", "lime", "blue"):
        Image.new("RGB", (8, 8), name).save(folder / f"{name}.png")
    return folder


@contextmanager
def serving(encoder: Path, data: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`embedserve serve` on a free port, ready; and the URL it printed."""
    command = [*COMMAND, "serve", "--port", "0", "--encoder", str(encoder), "--data", str(data), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, line + process.stderr.read()
            yield process, found.group()
        finally:
            process.kill()


def knock_for_ever(url: str) -> None:
    while True:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=1).close()


# ---- what a person types wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["serv"], '"serve"'),
        (["search", "red", "--colection", "x"], "--collection"),
        (["serve", "--max-pixel", "3"], "--max-pixels"),
        (["serve", "--port", "http"], "int"),
        (["index", "photos"], "--collection"),
    ],
)
def test_a_typo_is_answered_with_the_closest_word_and_exit_code_2(
    command: Command, arguments: list[str], answer: str
) -> None:
    code, out, err = command(*arguments, here=False)
    assert code == 2
    assert out == ""
    assert answer in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["search"],
        ["search", "red", "--text", "blue"],
        ["search", "red"],  # which collection?
        ["search", "red", "--collection", "x", "--filter", "{a: 1}"],
        ["search", "red", "--collection", "x", "--filter", "[]"],
        ["classify", "a.png"],
        ["embed"],
    ],
)
def test_a_command_that_says_too_little_or_too_much_is_wrong_usage(
    command: Command, arguments: list[str]
) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("embedserve: ")


def test_a_misspelt_collection_is_answered_with_the_closest(command: Command, photos: Path) -> None:
    command("index", photos, "--collection", "holidays")
    code, _, err = command("search", "red", "--collection", "hollidays")
    assert code == 1
    assert "did you mean 'holidays'" in err


def test_help_and_version_answer_without_the_heavy_imports() -> None:
    check = (
        "import sys; from embedserve.cli import main\n"
        "try: main([sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'fastapi', 'onnxruntime', 'faiss', 'httpx2', 'torch'} & set(sys.modules)))"
    )
    for flag in ("--help", "--version"):
        answer = subprocess.run(
            [sys.executable, "-c", check, flag], capture_output=True, text=True, check=True, timeout=60
        )
        assert answer.stdout.splitlines()[-1] == "[]"
    assert answer.stdout.splitlines()[0] == embedserve.__version__


def test_help_tells_exit_codes_and_every_field_of_the_config(command: Command) -> None:
    code, out, _ = command("serve", "--help", here=False)
    assert code == 0
    assert "Exit codes: 0 done" in out
    for flag in ("--max-pixels", "--api-key", "--no-auth", "--no-url-inputs", "--queue-size"):
        assert flag in out
    assert "--no-no-auth" not in out
    assert "Width times height of one image" in out


# ---- verbs -------------------------------------------------------------------------------------------


def test_a_folder_is_indexed_searched_and_known_the_second_time(command: Command, photos: Path) -> None:
    code, out, err = command("index", photos, "--collection", "photos")
    assert (code, err) == (0, "")
    assert "3 added" in out
    assert "3 unchanged" in command("index", photos, "--collection", "photos")[1]
    code, out, _ = command("search", "red", "--k", "1")  # the only collection needs no name
    assert code == 0
    assert re.fullmatch(r"\s*1\.000  red\.png\n", out)


def test_an_existing_file_is_searched_as_an_image_and_anything_else_as_a_text(
    command: Command, photos: Path
) -> None:
    command("index", photos, "--collection", "photos")
    for query in ([str(photos / "blue.png")], ["--image", str(photos / "blue.png")], ["--id", "blue.png"]):
        code, out, _ = command("search", *query, "--json")
        hits = json.loads(out)["hits"]
        assert code == 0
        assert (hits[0]["id"] == "blue.png") == (query[0] != "--id")  # an item is left out of its own hits
    code, out, _ = command("search", "blue", "--filter", '{"path": "red.png"}', "--json")
    assert [hit["id"] for hit in json.loads(out)["hits"]] == ["red.png"]


def test_nothing_found_is_said_on_stderr(command: Command, photos: Path) -> None:
    command("index", photos, "--collection", "photos")
    code, out, err = command("search", "blue", "--filter", '{"path": "none"}')
    assert (code, out, err) == (0, "", "Nothing matches.\n")


def test_bad_files_are_listed_and_make_exit_code_3(command: Command, photos: Path) -> None:
    (photos / "page.jpg").write_text("<html></html>")
    code, out, err = command("index", photos, "--collection", "photos")
    assert code == 3
    assert "3 added" in out
    assert "1 failed" in out
    assert "page.jpg: " in err
    code, out, err = command("index", photos, "--collection", "photos", "--json")
    report = json.loads(out)
    assert code == 3
    assert report["unchanged"] == 3
    assert report["problems"][0]["path"] == "page.jpg"


def test_a_folder_without_images_says_so(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = command("index", tmp_path / "empty", "--collection", "photos")
    assert (code, out) == (1, "")
    assert "holds no images" in err
    code, out, err = command("index", tmp_path / "nowhere", "--collection", "photos")
    assert code == 1
    assert "no folder" in err


def test_json_keeps_stdout_to_json_even_for_errors(command: Command) -> None:
    code, out, err = command("search", "red", "--collection", "nope", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "not_found_error"
    assert err.startswith("embedserve: ")


def test_classify_names_the_best_label_first(command: Command, photos: Path) -> None:
    code, out, _ = command("classify", photos / "red.png", "--labels", "blue, red", "--template", "{}")
    assert code == 0
    assert re.match(r".*red\.png\n\s+\d+\.\d%  red\n", out)
    code, out, err = command("classify", photos / "red.png", "gone.png", "--labels", "blue,red")
    assert code == 1
    assert "'gone.png' cannot be read" in err


def test_an_image_that_fails_is_named_and_the_others_are_classified(command: Command, photos: Path) -> None:
    (photos / "bad.png").write_text("no image")
    code, out, err = command(
        "classify", photos / "bad.png", photos / "red.png", "--labels", "blue,red", "--json"
    )
    results = json.loads(out)["results"]
    assert code == 3
    assert "error" in results[0]
    assert results[1]["labels"][0]["label"] == "red"
    assert "bad.png" in err


def test_embed_prints_json_or_saves_numpy_in_the_order_given(
    command: Command, photos: Path, tmp_path: Path
) -> None:
    (photos / "bad.png").write_text("no image")
    inputs = [photos / "red.png", photos / "bad.png", "--text", "blue"]
    code, out, _ = command("embed", *inputs, "--json")
    results = json.loads(out)["results"]
    assert code == 3
    assert [len(result.get("embedding", [])) for result in results] == [8, 0, 8]
    code, out, _ = command("embed", *inputs, "--out", tmp_path / "vectors")
    assert (code, out) == (3, "")
    rows = np.load(tmp_path / "vectors")
    assert rows.dtype == np.float32
    assert rows.shape == (3, 8)
    assert np.isnan(rows[1]).all()
    assert rows[0].argmax() == 0
    assert rows[2].argmax() == 2


def test_models_lists_the_encoder(command: Command) -> None:
    assert command("models") == (0, "tiny\n", "")


def test_check_proves_a_bundle_and_refuses_an_altered_one(
    command: Command, tiny_folder: Path, tmp_path: Path
) -> None:
    code, out, _ = command("check", tiny_folder, "--seconds", "0.01", here=False)
    assert code == 0
    assert "tiny: image and text, 8 numbers" in out
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in tiny_folder.iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    (altered / "README.md").write_text("another card")
    code, out, _ = command("check", altered, "--json", here=False)
    assert code == 1
    assert "sha256" in json.loads(out)["error"]["message"]


def test_check_says_what_ran_where_and_how_fast(command: Command, seeing_folder: Path) -> None:
    options = ("--seconds", "0.01", "--threads", "1", "--device", "cpu")
    code, out, _ = command("check", seeing_folder, *options, here=False)
    assert code == 0
    assert "device  cpu (CPUExecutionProvider), float32" in out
    assert "offers  patches: 4 × 8 on 2 × 2 cells, in the space of texts" in out
    assert "offers  attention: 2 × 4 on 2 × 2 cells" in out
    assert "offers  prefixes of 4, 6 numbers" in out
    assert re.search(r"speed   \d+ images/s in batches of 4, \d+ one by one, 1 threads", out)
    code, out, _ = command("check", seeing_folder, *options, "--json", here=False)
    report = json.loads(out)
    assert (code, report["ok"], report["provider"]) == (0, True, "CPUExecutionProvider")
    assert report["bytes"] == sum(
        path.stat().st_size for path in seeing_folder.iterdir() if path.name != "encoder.json"
    )
    speed = report["speed"]
    for key in (
        "images_per_second",
        "texts_per_second",
        "single_images_per_second",
        "single_texts_per_second",
    ):
        assert speed[key] > 0


@pytest.mark.parametrize("verb", [("check",), ("serve", "--port", "0", "--encoder")])
def test_a_device_that_does_not_exist_is_refused(
    command: Command,
    verb: tuple[str, ...],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*verb, tiny_folder, "--device", "gpu", here=False)
    assert code == 1
    assert "--device is 'gpu'; use auto, cpu, cuda" in err


def test_the_device_comes_from_the_environment_too(
    command: Command, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDSERVE_DEVICE", "cuda:x")
    assert "--device is 'cuda:x'" in command("check", tiny_folder, here=False)[2]


def test_index_makes_a_collection_of_fewer_numbers(
    command: Command, seeing_folder: Path, photos: Path, tmp_path: Path
) -> None:
    where = ("--encoder", seeing_folder, "--data", tmp_path / "short")
    index = ("index", photos, "--collection", "short", "--dimensions")
    assert command(*index, "4", *where, here=False)[0] == 0
    code, out, _ = command("search", "blue", "--json", *where, here=False)
    assert (code, json.loads(out)["hits"][0]["id"]) == (0, "blue.png")
    code, _, err = command(*index, "6", *where, here=False)
    assert code == 1
    assert "keeps 4 numbers of each vector, not 6" in err
    code, _, err = command("index", photos, "--collection", "odd", "--dimensions", "5", *where, here=False)
    assert code == 1
    assert "prefixes of 4, 6, 8" in err


def test_export_answers_an_unknown_source_with_the_closest(command: Command, tmp_path: Path) -> None:
    code, _, err = command("export", "strater", "--out", tmp_path / "out", here=False)
    assert code == 1
    assert "did you mean 'starter'" in err


def test_export_without_torch_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['torch'] = None\n"
    code = hide + "from embedserve.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "export", "starter", "--out", str(tmp_path / "out")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 1
    assert answer.stderr.startswith("embedserve: Exporting needs 'torch'; install it with `pip install ")


def test_embedserve_variables_are_options(
    command: Command, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMBEDSERVE_ENCODER", str(tiny_folder))
    monkeypatch.setenv("EMBEDSERVE_DATA", str(tmp_path / "elsewhere"))
    code, out, _ = command("models", here=False)
    assert (code, out) == (0, "tiny\n")
    assert (tmp_path / "elsewhere").is_dir()


def test_a_reader_that_stops_early_is_no_error(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["embed", "--text", "red", "--encoder", tiny_folder, "--data", tmp_path / "data"]
    answer = subprocess.run(
        [*COMMAND, *map(str, arguments)], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert answer.stderr == b""


# ---- serve -------------------------------------------------------------------------------------------


def test_serve_is_ready_when_it_prints_its_url_and_ends_cleanly(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as (process, url):
        assert httpx2.get(f"{url}/readyz").json()["status"] == "ready"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_ctrl_c_stops_serve_without_a_traceback(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, tmp_path) as (process, _):
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_a_request_that_runs_when_sigterm_comes_is_answered(tiny_folder: Path, tmp_path: Path) -> None:
    """The client sends its headers; the server says `100 Continue` once it is inside the request."""
    body = json.dumps({"input": "red"}).encode()
    with serving(tiny_folder, tmp_path) as (process, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as connection:
            head = (
                "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
            )
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 100")
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionError):  # the port closes first: new work goes elsewhere
                knock_for_ever(url)
            connection.sendall(body)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"embedding"' in answer
        assert process.wait(timeout=20) == 0


def test_a_taken_port_is_told_at_once(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = command("serve", "--port", taken.getsockname()[1])
    assert (code, out) == (1, "")
    assert "is in use" in err
    assert "--port" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--host", "no.such.host.invalid", "--no-auth"], "Use an address of this machine"),
        (["--host", "192.0.2.1", "--no-auth"], "192.0.2.1:8000 cannot be used"),
        (["--port", "70000"], "0 (a free one) to 65535"),
        (["--port", "-1"], "0 (a free one) to 65535"),
    ],
)
def test_an_address_that_cannot_be_served_says_why(
    command: Command, options: list[str], message: str
) -> None:
    code, _, err = command("serve", *options)
    assert code == 1
    assert message in err


def test_serve_refuses_a_bundle_that_is_none(tmp_path: Path) -> None:
    answer = run("serve", "--port", "0", "--encoder", tmp_path)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "is not an encoder bundle" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_verbs_ask_a_running_server_and_say_so_when_it_holds_the_data(
    tiny_folder: Path, tmp_path: Path, photos: Path
) -> None:
    with serving(tiny_folder, tmp_path / "data", "--api-key", "secret") as (_, url):
        answer = run("index", photos, "--collection", "photos", "--url", url, "--api-key", "secret")
        assert (answer.returncode, answer.stderr) == (0, "")
        refused = run("search", "red", "--url", url)
        assert refused.returncode == 1
        assert "API key" in refused.stderr
        locked = run("search", "red", "--data", tmp_path / "data", "--encoder", tiny_folder)
        assert locked.returncode == 1
        assert "--url http://127.0.0.1:8000" in locked.stderr


def test_ctrl_c_ends_a_verb_with_exit_code_130_and_no_traceback(tiny_folder: Path, tmp_path: Path) -> None:
    """A pipe in place of an image: once it is opened, the verb is at work."""
    os.mkfifo(tmp_path / "pipe.png")
    command = [*COMMAND, "embed", str(tmp_path / "pipe.png"), "--encoder", str(tiny_folder)]
    with subprocess.Popen(
        [*command, "--data", str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        with (tmp_path / "pipe.png").open("wb"):
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "Interrupted; what was answered is kept.\n"
