"""Checkpoints that were damaged after they were saved: the run continues from a whole one or says why it does not.

Damage of the newest checkpoint costs the steps since the one before: the run starts from that one and ends as the undisturbed
run does, to the bit. With `checkpoint.resume: strict`, or if nothing whole is left, it refuses, names what is damaged, and
says what can be done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.launch import Ending
from tests.training.blends import Job, assert_same_end, blend, logs, step_folder, whole_steps
from tests.training.commands import read_status

BEFORE, NEWEST, LAST = 2, 3, 4  # the run has checkpoints of the first two, and ends after LAST
RANK_FILES = ("rank-00000.safetensors", "rank-00001.safetensors")
FILES = ("manifest.json", *RANK_FILES, "assets/hf/tokenizer.json")


@pytest.fixture(scope="module")
def make(data: Path, more_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    (tokenizer / "tokenizer.json").write_text('{"version": "1.0", "note": "it only travels along"}')

    def job(run: Path, **checkpoint: Any) -> Job:
        sections = {"checkpoint": checkpoint, "data": {"tokenizer": str(tokenizer)}, "training": {"steps": LAST}}
        return Job.make(2, blend(data, more_data, run, **sections))

    return job


@pytest.fixture(scope="module")
def undisturbed(make: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make(tmp_path_factory.mktemp("undisturbed") / "run", keep_last=1000)
    job.finish()
    return job


@pytest.fixture(scope="module")
def begun(make: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = make(tmp_path_factory.mktemp("begun") / "run")
    job.finish(f"training.steps={NEWEST}")
    assert whole_steps(job.checkpoints) == [BEFORE, NEWEST]
    return job.run


@pytest.fixture
def job(begun: Path, make: Callable[..., Job], tmp_path: Path) -> Job:
    """A run that stands at step NEWEST."""
    shutil.copytree(begun, tmp_path / "run")
    return make(tmp_path / "run")


def flip(path: Path, place: int) -> None:
    """Change one bit of a file, at a byte counted from the start, or from the end if below 0."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def assert_continues(job: Job, undisturbed: Job, step: int, said: str) -> None:
    """The run starts from the checkpoint of `step`, says what is wrong, and ends as it should."""
    endings = job.start()
    assert [ending.code for ending in endings] == [0, 0], logs(endings)
    assert f"continuing from {step_folder(job.checkpoints, step)}\n" in endings[0].log, logs(endings)
    assert said in endings[0].log, logs(endings)
    assert read_status(job.run) == {"outcome": "done", "step": LAST}
    assert_same_end(job, undisturbed, LAST)


def assert_refuses(job: Job, endings: list[Ending], *said: str) -> None:
    """Exit code 1 on every rank, the reason once in the log, and no trace of a Python error."""
    assert [ending.code for ending in endings] == [1, 1], logs(endings)
    assert "error: " in endings[0].log and "Traceback" not in endings[0].log, logs(endings)
    for text in said:
        assert text in endings[0].log, logs(endings)


def slow(*values: Any) -> Any:
    """A case that is one more of its kind."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Of a rank's file: in the length of the header, in the header, in the first and in the last values; and anywhere in the others.
@pytest.mark.parametrize(
    "name, place",
    [("manifest.json", 1000), ("assets/hf/tokenizer.json", 20), (RANK_FILES[0], 0), (RANK_FILES[0], -1), (RANK_FILES[1], -9000)]
    + [slow("manifest.json", 0), slow("manifest.json", -3), slow(RANK_FILES[0], 100), slow(RANK_FILES[0], -9000)]
    + [slow(RANK_FILES[1], place) for place in (0, 100, -1)],
)
def test_a_flipped_bit_in_the_newest(job: Job, undisturbed: Job, name: str, place: int) -> None:
    file = step_folder(job.checkpoints, NEWEST) / name
    flip(file, place)
    assert_continues(job, undisturbed, BEFORE, str(file))


@pytest.mark.parametrize("name", FILES[1:])
def test_a_deleted_file_of_the_newest(job: Job, undisturbed: Job, name: str) -> None:
    file = step_folder(job.checkpoints, NEWEST) / name
    file.unlink()
    assert_continues(job, undisturbed, BEFORE, f"{file} is missing")


def test_without_a_manifest_it_is_an_interrupted_save(job: Job, undisturbed: Job) -> None:
    """Nothing to warn about: it happens whenever a run is killed."""
    (step_folder(job.checkpoints, NEWEST) / "manifest.json").unlink()
    endings = job.start()
    assert [ending.code for ending in endings] == [0, 0], logs(endings)
    begin, continuing, _ = endings[0].log.partition(f"continuing from {step_folder(job.checkpoints, BEFORE)}\n")
    assert continuing and f"step-{NEWEST:08d}" not in begin, logs(endings)
    assert_same_end(job, undisturbed, LAST)


@pytest.mark.parametrize("length", [0, 1000, slow(1), slow(-1)])
def test_a_truncated_manifest(job: Job, undisturbed: Job, length: int) -> None:
    manifest = step_folder(job.checkpoints, NEWEST) / "manifest.json"
    content = manifest.read_bytes()[:length]
    manifest.write_bytes(content)
    assert_continues(job, undisturbed, BEFORE, f"{manifest} is truncated or damaged ({len(content)} bytes")


@pytest.mark.parametrize("name", [RANK_FILES[1], slow(RANK_FILES[0])])
@pytest.mark.parametrize("length", [-1, slow(0), slow(7)])
def test_a_truncated_file_of_a_rank(job: Job, undisturbed: Job, name: str, length: int) -> None:
    file = step_folder(job.checkpoints, NEWEST) / name
    file.write_bytes(file.read_bytes()[:length])
    assert_continues(job, undisturbed, BEFORE, f"{file} has {file.stat().st_size} bytes")


def sealed(body: dict[str, Any]) -> bytes:
    """A manifest with the right checksum over whatever it says."""
    body = {key: value for key, value in body.items() if key != "manifest_checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps(body | {"manifest_checksum": xxhash.xxh3_128_hexdigest(text.encode())}).encode()


GARBAGE: dict[str, Any] = {
    "null": None,
    "number": 3,
    "list": [1, 2],
    "empty": {},
    "foreign": {"weight_map": {"a": "b"}},
    "checksum of nothing": {"manifest_checksum": None},
}


@pytest.mark.parametrize("garbage", ["list", "foreign", *map(slow, ["null", "number", "empty", "checksum of nothing"])])
def test_a_manifest_that_is_some_other_json(job: Job, undisturbed: Job, garbage: str) -> None:
    manifest = step_folder(job.checkpoints, NEWEST) / "manifest.json"
    manifest.write_text(json.dumps(GARBAGE[garbage]))
    assert_continues(job, undisturbed, BEFORE, f"{manifest} is ")


@pytest.mark.parametrize("key", ["run_state", slow("format"), slow("tensors")])
def test_a_manifest_that_lacks_something_although_its_checksum_is_right(job: Job, undisturbed: Job, key: str) -> None:
    manifest = step_folder(job.checkpoints, NEWEST) / "manifest.json"
    body = json.loads(manifest.read_bytes())
    del body[key]
    manifest.write_bytes(sealed(body))
    assert_continues(job, undisturbed, BEFORE, str(manifest))


@pytest.mark.parametrize("name", ["../step-00000002/rank-00000.safetensors", "/etc/hostname", slow("a/../../x"), slow("..\\x")])
def test_a_manifest_that_names_a_file_elsewhere(job: Job, undisturbed: Job, name: str) -> None:
    """Nothing out of the folder is read, even if the manifest says that it is right so."""
    manifest = step_folder(job.checkpoints, NEWEST) / "manifest.json"
    body = json.loads(manifest.read_bytes())
    body["files"][name] = body["files"][RANK_FILES[0]]
    manifest.write_bytes(sealed(body))
    assert_continues(job, undisturbed, BEFORE, f"{manifest}: file name {name!r} leads out of the checkpoint")


def test_the_manifests_of_these_tests_would_be_read(job: Job, undisturbed: Job) -> None:
    """One that is only sealed again is right: it is what they say that is refused."""
    manifest = step_folder(job.checkpoints, NEWEST) / "manifest.json"
    manifest.write_bytes(sealed(json.loads(manifest.read_bytes())))
    assert_continues(job, undisturbed, NEWEST, "")


def test_two_damaged_ones_cost_the_steps_since_the_third(make: Callable[..., Job], undisturbed: Job, tmp_path: Path) -> None:
    job = make(tmp_path / "run", keep_last=3)
    job.finish(f"training.steps={NEWEST}")
    flip(step_folder(job.checkpoints, NEWEST) / RANK_FILES[1], -1)
    (step_folder(job.checkpoints, BEFORE) / RANK_FILES[0]).unlink()
    assert_continues(job, undisturbed, BEFORE - 1, str(step_folder(job.checkpoints, BEFORE) / RANK_FILES[0]))


def test_nothing_whole_left_is_refused(job: Job) -> None:
    """Training would silently begin anew. Both are named, each with its reason, and so is the way out; nothing is changed."""
    files = [step_folder(job.checkpoints, BEFORE) / RANK_FILES[0], step_folder(job.checkpoints, NEWEST) / "manifest.json"]
    for file in files:
        flip(file, -3)
    before = {path: path.read_bytes() for path in job.checkpoints.rglob("*") if path.is_file()}
    endings = job.start()
    assert_refuses(job, endings, *map(str, files), "checkpoint.resume=never")
    assert {path: path.read_bytes() for path in job.checkpoints.rglob("*") if path.is_file()} == before
    job.finish("checkpoint.resume=never")
    assert whole_steps(job.checkpoints)[-1] == LAST


def test_an_interrupted_save_alone_is_a_fresh_start(job: Job, undisturbed: Job) -> None:
    """No checkpoint was ever whole: there is nothing that could be lost."""
    for step in (BEFORE, NEWEST):
        (step_folder(job.checkpoints, step) / "manifest.json").unlink()
    job.finish()
    assert_same_end(job, undisturbed, LAST)


@pytest.mark.parametrize("name", ["manifest.json", RANK_FILES[1], slow(RANK_FILES[0]), slow(FILES[-1])])
def test_strict_refuses_a_damaged_newest(job: Job, undisturbed: Job, name: str) -> None:
    file = step_folder(job.checkpoints, NEWEST) / name
    flip(file, 5)
    assert_refuses(job, job.start("checkpoint.resume=strict"), str(file), "checkpoint.resume")
    flip(file, 5)  # mended
    job.finish("checkpoint.resume=strict")
    assert_same_end(job, undisturbed, LAST)


def test_strict_has_nothing_against_a_damaged_old_one_or_an_interrupted_save(job: Job, undisturbed: Job) -> None:
    flip(step_folder(job.checkpoints, BEFORE) / RANK_FILES[0], -1)
    (step_folder(job.checkpoints, NEWEST + 5) / "assets").mkdir(parents=True)
    job.finish("checkpoint.resume=strict")
    assert_same_end(job, undisturbed, LAST)
