"""Checkpoints are read back whole, whatever happened while they were written."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedserve.errors import EmbedServeError, InvalidField, NotFound
from training import checkpoint
from training.checkpoint import Best, Checkpoints, load, save

KILLS = int(os.environ.get("EMBEDSERVE_CRASH_ROUNDS", "12"))
MUCH = 200_000
"""Numbers in a tensor of .8 MB."""


def state(step: int, numbers: int = 1000) -> dict[str, Any]:
    """A state in which every part says which step it is of."""
    return {"step": step, "model": {"weight": torch.full((numbers,), float(step))}}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


# ------------------------------------------------------------------------------------------ one file


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "plain": [1, 2.5, "three", None, True, (4, b"5"), {6: "seven"}],
    }
    save(tmp_path / "x.pt", saved)
    found = load(tmp_path / "x.pt")
    assert found["plain"] == saved["plain"]
    for key in ("random", "half"):
        assert torch.equal(found[key], saved[key])
        assert found[key].dtype == saved[key].dtype
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(
        found["optimizer"]["state"][0]["momentum_buffer"], optimizer.state[network.weight]["momentum_buffer"]
    )
    network.load_state_dict(found["model"])


def test_nothing_is_left_beside_the_file(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", state(1))
    save(tmp_path / "x.pt", state(2))
    assert names(tmp_path) == {"x.pt"}
    assert load(tmp_path / "x.pt")["step"] == 2


def test_a_file_is_replaced_and_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", state(1))
    os.link(tmp_path / "x.pt", tmp_path / "best.pt")
    save(tmp_path / "x.pt", state(2))
    assert load(tmp_path / "best.pt")["step"] == 1


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.pt", state(1))

    def interrupted(state: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "x.pt", state(2))
    assert names(tmp_path) == {"x.pt"}
    assert load(tmp_path / "x.pt")["step"] == 1


def test_what_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['figures'\]\['knn'\]\[1\] is a numpy.float64"):
        save(tmp_path / "x.pt", {"figures": {"knn": [0.5, np.float64(0.6)]}})
    with pytest.raises(TypeError, match=r"the key PosixPath\('a'\) of state is a pathlib.PosixPath"):
        save(tmp_path / "x.pt", {Path("a"): 1})  # type: ignore[dict-item]
    assert names(tmp_path) == set()


def test_a_checkpoint_that_is_not_there_says_which_one_is(checkpoints: Checkpoints) -> None:
    checkpoints.write(7, state(7))
    with pytest.raises(
        NotFound, match=r"no checkpoint '.*step-9.pt'.*newest whole one is '.*step-00000007.pt'"
    ):
        load(checkpoints.folder / "step-9.pt")


def test_a_file_that_was_cut_short_names_the_newest_whole_one(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, state(1))
    path = checkpoints.write(2, state(2))
    path.write_bytes(path.read_bytes()[:-100])
    for damaged in (path, checkpoints.folder / "last.pt"):
        with pytest.raises(
            EmbedServeError, match=r"is cut short or damaged.*whole one is '.*step-00000001.pt'"
        ) as told:
            load(damaged)
        assert told.value.code == "checkpoint_damaged"


def test_one_flipped_bit_in_a_weight_is_found(tmp_path: Path) -> None:
    save(tmp_path / "x.pt", state(1))
    content = bytearray((tmp_path / "x.pt").read_bytes())
    at = content.index(np.ones(100, np.float32).tobytes()) + 50
    content[at] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(
        EmbedServeError, match=r"checksum of its part 'archive/data/0' is wrong.*no other one"
    ):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"PK\x03\x04 and so on", b"no archive at all"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(EmbedServeError, match="is cut short or damaged"):
        load(tmp_path / "x.pt")


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("letter.txt", "hello")
    with pytest.raises(EmbedServeError, match="a whole file, but not a checkpoint"):
        load(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(EmbedServeError, match="holds a list"):
        load(tmp_path / "y.pt")


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_inside_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"step": Trap(tmp_path / "sprung")}, tmp_path / "x.pt")
    with pytest.raises(EmbedServeError, match="anything else could run code"):
        load(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "sprung").exists(), "the trap works, so the test above can fail"


# ------------------------------------------------------------------------- full disks and kill -9


@contextmanager
def files_of_at_most(length: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `length` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_writing_fails_half_way_the_old_checkpoint_stays(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, state(1, MUCH))
    checkpoints.mark_best(1, 0.5)
    checkpoints.write(2, state(2, MUCH))
    checkpoints.write(3, state(3, MUCH))
    before = names(checkpoints.folder)
    with files_of_at_most(MUCH * 2), pytest.raises(EmbedServeError) as told:
        checkpoints.write(3, state(30, MUCH))
    assert told.value.code == "disk_full"
    assert "bytes are free and about 800,0" in str(told.value)
    assert names(checkpoints.folder) == before, "no temporary file, and nothing pruned"
    assert load(checkpoints.folder / "step-00000003.pt")["step"] == 3
    assert load(checkpoints.folder / "last.pt")["step"] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_told_with_the_bytes_that_are_free(tmp_path: Path) -> None:
    (tmp_path / ".x.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(
        EmbedServeError, match=r"the disk is full; [\d,]+ bytes are free and about 4,0\d\d are needed"
    ):
        save(tmp_path / "x.pt", state(1))
    assert names(tmp_path) == set()


def test_a_disk_that_notices_only_at_the_end_loses_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems report a full disk when the file is flushed."""
    save(tmp_path / "x.pt", state(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EmbedServeError, match="the disk is full"):
        save(tmp_path / "x.pt", state(2))
    assert names(tmp_path) == {"x.pt"}
    assert load(tmp_path / "x.pt")["step"] == 1


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(EmbedServeError, match="cannot be written: No such file or directory"):
        save(tmp_path / "gone" / "x.pt", state(1))
    (tmp_path / "file").touch()
    with pytest.raises(EmbedServeError, match=r"'.*file' cannot be made: File exists"):
        Checkpoints(tmp_path / "file", keep=1)


def _write_for_ever(folder: Path, first: int) -> None:
    torch.set_num_threads(1)  # the threads of the parent are not there after a fork
    checkpoints = Checkpoints(folder, keep=2)
    for step in range(first, first + 100_000):
        checkpoints.write(step, state(step, MUCH))
        if step % 3 == 0:
            checkpoints.mark_best(step, step / 1000)


def test_a_killed_process_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    choose, context = random.Random(20_260_711), multiprocessing.get_context("fork")
    written, temporary = 0, 0
    for _ in range(KILLS):
        process = context.Process(target=_write_for_ever, args=(tmp_path, written + 1))
        process.start()
        checkpoints = Checkpoints(tmp_path, keep=2)
        _wait_for(checkpoints, written, process)
        time.sleep(choose.uniform(0, 0.05))
        process.kill()
        process.join()

        latest, best = checkpoints.latest(), checkpoints.best()
        assert latest is not None
        temporary += any(name.endswith(".tmp") for name in names(tmp_path))
        for path in [*tmp_path.glob("*.pt"), best or latest]:
            found = load(path)
            assert bool((found["model"]["weight"] == found["step"]).all()), path
            if path.name.startswith("step-"):
                assert path.name == f"step-{found['step']:08d}.pt"
        newest = load(latest)["step"]
        assert newest > written, "nothing that was acknowledged is lost"
        mark = checkpoints.best_mark()
        assert mark is None or (
            mark.score == mark.step / 1000 and best == tmp_path / f"step-{mark.step:08d}.pt"
        )
        written = newest
    assert temporary, "no kill met a save under way, so this proved nothing"
    assert checkpoints.best() is not None


def _wait_for(checkpoints: Checkpoints, written: int, process: Any) -> None:
    """Until there is a checkpoint of a later step than `written`."""
    until = time.monotonic() + 60
    while max(checkpoints.steps(), default=0) <= written:
        assert process.is_alive()
        assert time.monotonic() < until, "the child writes nothing"
        time.sleep(0.001)


# ------------------------------------------------------------------------------------ those of a run


def test_the_newest_stay_and_the_best(checkpoints: Checkpoints) -> None:
    for step in (10, 20, 30, 40, 50):
        checkpoints.write(step, state(step))
        if step == 20:
            checkpoints.mark_best(20, 0.81)
    assert checkpoints.steps() == [20, 40, 50]
    assert checkpoints.best_mark() == Best(20, 0.81)
    best, latest = checkpoints.best(), checkpoints.latest()
    assert best is not None
    assert latest is not None
    assert (load(best)["step"], load(latest)["step"]) == (20, 50)
    assert names(checkpoints.folder) == {
        *("best.json", "best.pt", "last.pt"),
        *("step-00000020.pt", "step-00000040.pt", "step-00000050.pt"),
    }
    checkpoints.mark_best(50, 0.9)
    assert checkpoints.steps() == [40, 50], "what was the best is one of many now"


def test_an_empty_run_has_neither(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    assert checkpoints.best_mark() is None
    with pytest.raises(InvalidField, match="keep=0 would keep no checkpoint"):
        Checkpoints(checkpoints.folder, keep=0)


def test_going_on_from_an_earlier_step_gives_up_the_later_ones(checkpoints: Checkpoints) -> None:
    for step in (10, 20, 30):
        checkpoints.write(step, state(step))
    (checkpoints.folder / "step-00000030.pt").write_bytes(b"damaged")
    checkpoints.write(25, state(25))
    assert checkpoints.steps() == [20, 25], "a damaged later one never crowds out the one just written"


def test_a_best_one_of_a_later_step_is_kept(checkpoints: Checkpoints) -> None:
    checkpoints.write(30, state(30))
    checkpoints.mark_best(30, 0.9)
    checkpoints.write(10, state(10))
    assert checkpoints.steps() == [10, 30]


def test_the_best_must_be_there_and_its_score_a_number(checkpoints: Checkpoints) -> None:
    checkpoints.write(10, state(10))
    with pytest.raises(NotFound, match="no checkpoint of step 11"):
        checkpoints.mark_best(11, 0.5)
    with pytest.raises(InvalidField, match="score=nan is not finite"):
        checkpoints.mark_best(10, float("nan"))
    assert checkpoints.best() is None


def test_writing_the_best_step_again_renews_its_name(checkpoints: Checkpoints) -> None:
    checkpoints.write(10, state(10))
    checkpoints.mark_best(10, 0.5)
    checkpoints.write(10, {**state(10), "again": True})
    assert load(checkpoints.folder / "best.pt")["again"]


def test_a_damaged_newest_is_passed_over_with_a_warning(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.write(1, state(1))
    checkpoints.write(2, state(2)).write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == checkpoints.folder / "step-00000001.pt"
    assert "step-00000002.pt' is cut short or damaged; the one before it is taken" in caplog.text


def test_a_checkpoint_is_looked_through_once_and_again_when_it_was_touched(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop asks for the latest one often, and a large file takes seconds."""
    looked, really = [], checkpoint._damage
    monkeypatch.setattr(checkpoint, "_damage", lambda path: (looked.append(path), really(path))[1])
    path = checkpoints.write(1, state(1))
    assert [checkpoints.latest(), checkpoints.latest()] == [path, path]
    assert looked == [], "what was just written is known to be whole"
    reader = Checkpoints(checkpoints.folder, keep=2)
    assert [reader.latest(), reader.latest()] == [path, path]
    assert looked == [path]
    path.write_bytes(b"torn")
    with pytest.raises(EmbedServeError, match="damaged"):
        reader.latest()


def test_a_run_with_only_damaged_checkpoints_does_not_start_anew(checkpoints: Checkpoints) -> None:
    for step in (1, 2):
        checkpoints.write(step, state(step)).write_bytes(b"torn")
    with pytest.raises(EmbedServeError, match=r"All 2 checkpoints in '.*' are damaged"):
        checkpoints.latest()


def test_a_damaged_best_mark_is_passed_over_with_a_warning(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.write(1, state(1))
    checkpoints.mark_best(1, 0.5)
    for content in ("", "[]", '{"step": 1}'):
        (checkpoints.folder / "best.json").write_text(content)
        with caplog.at_level(logging.WARNING):
            assert checkpoints.best_mark() is None
        assert checkpoints.best() == checkpoints.folder / "best.pt"
        assert "best.json' is damaged" in caplog.text
        caplog.clear()


def test_what_a_killed_save_left_goes_with_the_next_one(checkpoints: Checkpoints) -> None:
    (checkpoints.folder / ".step-00000004.pt.tmp").write_bytes(b"half")
    checkpoints.write(5, state(5))
    assert names(checkpoints.folder) == {"step-00000005.pt", "last.pt"}


def test_other_files_in_the_folder_are_left_alone(checkpoints: Checkpoints) -> None:
    for name in ("step-1.pt", "step-mine.pt", "notes.txt"):
        (checkpoints.folder / name).touch()
    for step in (1, 2, 3):
        checkpoints.write(step, state(step))
    assert {"step-1.pt", "step-mine.pt", "notes.txt"} <= names(checkpoints.folder)
    assert checkpoints.steps() == [2, 3]


def test_steps_of_more_than_eight_digits_keep_their_order(checkpoints: Checkpoints) -> None:
    for step in (99_999_999, 100_000_000):
        checkpoints.write(step, state(step))
    assert checkpoints.latest() == checkpoints.folder / "step-100000000.pt"


def test_last_and_best_take_no_room_and_survive_a_copy(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints.write(1, state(1))
    checkpoints.mark_best(1, 0.5)
    for name in ("last.pt", "best.pt"):
        assert (checkpoints.folder / name).samefile(path)
        shutil.copy(checkpoints.folder / name, tmp_path / name)
    shutil.rmtree(checkpoints.folder)
    for name in ("last.pt", "best.pt"):
        assert load(tmp_path / name)["step"] == 1


def test_last_and_best_are_copies_where_there_are_no_hard_links(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*paths: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint.os, "link", refused)
    path = checkpoints.write(1, state(1))
    assert not (checkpoints.folder / "last.pt").samefile(path)
    assert load(checkpoints.folder / "last.pt")["step"] == 1
    assert names(checkpoints.folder) == {"step-00000001.pt", "last.pt"}


def test_the_best_mark_is_plain_json(checkpoints: Checkpoints) -> None:
    checkpoints.write(12, state(12))
    checkpoints.mark_best(12, 0.8125)
    assert json.loads((checkpoints.folder / "best.json").read_text()) == {"step": 12, "score": 0.8125}
