"""A run on conversations that is killed in its second epoch goes on with the same rows in the same order.

Every row that a rank reads is written down by the rank itself, with its number, before it is trained on. The killed rank is so
with SIGKILL in the middle of a step; the expected rows and numbers are those of a run that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.cli.main import main
from megatron_llm.config import Config
from megatron_llm.data.stream import TokenStream, build_train_stream
from megatron_llm.ops.batch import Batch
from megatron_llm.training import loop
from megatron_llm.training.resolve import resolve
from tests.data.conversations import WEIGHTS, Message, write
from tests.launch import KILLED, launch
from tests.training.blends import Job, assert_same_end, blend, logs, whole_steps
from tests.training.commands import read_metrics

LAST, ROWS, LENGTH = 6, 6, 16  # steps, rows of a step, tokens of a row
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {  # ranks, `parallel`, micro-batch size
    "dp2": (2, {}, 1),
    "dp2, larger": (2, {}, 3),
    "single": (1, {}, 2),
    "pp2": (2, {"pipeline_parallel": 2}, 2),
}


class RecordingStream(TokenStream):
    """A stream that writes down each row before giving it, a line `number digest`, and dies when it comes to row `last`."""

    @classmethod
    def of(cls, config: Config, path: str, last: int | None) -> RecordingStream:
        stream = build_train_stream(config)
        stream.__class__ = cls
        assert isinstance(stream, cls)
        stream.path, stream.last = path, last
        return stream

    path: str
    last: int | None

    def batch(self, rows: Sequence[int | None]) -> Batch:
        if self.last is not None and any(row is not None and row >= self.last for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        batch = super().batch(rows)
        with open(self.path, "a") as file:
            for place, number in enumerate(rows):
                file.write(f"{number} {_digest(batch, place * LENGTH)}\n")
        return batch


def _digest(batch: Batch, begin: int) -> str:
    """Of everything that a row is, wherever it stands in a micro-batch."""
    part = slice(begin, begin + LENGTH)
    assert batch.roles_T is not None
    columns = (batch.tokens_T, batch.labels_T, batch.weights_T, batch.positions_T, batch.roles_T)
    starts = [start - begin for start in batch.cu_seqlens if begin <= start < begin + LENGTH]
    return hashlib.sha256(json.dumps([*(column[part].tolist() for column in columns), starts]).encode()).hexdigest()


def train_recorded(arguments: list[str], folder: str, killed: int | None, last: int | None) -> int:
    """The command; each rank writes its rows into `folder`, and rank `killed` dies when it comes to row `last`."""
    rank = int(os.environ["RANK"])
    path = f"{folder}/{rank}"
    loop.build_train_stream = lambda config: RecordingStream.of(config, path, last if rank == killed else None)
    return main(["train", *arguments])


def recorded(folder: Path) -> list[tuple[int, str]]:
    """(number, digest) of every row read, in their order; ranks of one replica read the same."""
    found = [line.split() for path in folder.iterdir() for line in path.read_text().splitlines()]
    return sorted({(int(number), digest) for number, digest in found})


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Some longer than a row, some of several turns, with variants of half of them."""
    talks = [
        [Message("user", 1 + n % 3, bos=True), Message("assistant", 1 + n * 7 % 4, weight=WEIGHTS[n % 3], before=1)]
        for n in range(23)
    ]
    talks += [[*talks[n], Message("user", 4), Message("assistant", 5, before=1)] * 2 for n in range(3)]
    write(tmp_path / "chat.flip", [[] if n % 2 else talk[::-1] for n, talk in enumerate(talks)], first=700)
    return Path(write(tmp_path / "chat", talks))


def make(conversations: Path, name: str, layout: str, order: str) -> Job:
    world, parallel, micro_batch_size = LAYOUTS[layout]
    raw = blend(
        conversations,
        conversations,
        conversations.parent / name,
        model={"vocab_size": 1200},
        parallel=parallel,
        training={"steps": LAST, "sequence_length": LENGTH, "micro_batch_size": micro_batch_size},
        precision={"compute": "float64"},
    )
    raw["data"] = {"kind": "chat", "train": [{"path": str(conversations)}], "order": order, "overlong": "split_turns"}
    raw["data"] |= {"prompt_loss_weight": 0.25, "conversation_augment": {"flip": 0.5}}
    return Job.make(world, raw)


def run(job: Job, folder: Path, killed: int | None = None, last: int | None = None) -> list[tuple[int, str]]:
    """Run the command, and return the rows that were read."""
    folder.mkdir()
    endings = launch(job.world, train_recorded, [str(job.config)], str(folder), killed, last, grace=0.3)
    if killed is None:
        assert [ending.code for ending in endings] == [0] * job.world, logs(endings)
        said = " conversations in .* parts, .* of them with loss, in .* rows an epoch .* packed .* dropped, .* replaced by flip"
        assert re.search(said, endings[0].log), "the start tells what the rows are made of"
    else:
        assert endings[killed].code == KILLED and not endings[killed].put_down, logs(endings)
    return recorded(folder)


def killed_and_resumed(conversations: Path, layout: str, order: str, others: Sequence[str]) -> None:
    tmp_path = conversations.parent
    whole = make(conversations, "whole", layout, order)
    expected = run(whole, tmp_path / "rows of whole")
    assert [number for number, _ in expected] == list(range(LAST * ROWS))
    per_epoch = build_train_stream(resolve(whole.config, None, whole.world).config).rows_per_epoch
    assert per_epoch > ROWS and per_epoch % ROWS and 2 * per_epoch < LAST * ROWS, "steps and epochs end apart"
    epochs = [Counter(digest for number, digest in expected if number // per_epoch == epoch) for epoch in (0, 1)]
    assert epochs[0] != epochs[1] and sum(epochs[0].values()) == sum(epochs[1].values()), "others share a row in the second epoch"

    job = make(conversations, "killed", layout, order)
    last = per_epoch + per_epoch // 2 + 1  # in the middle of the second epoch
    before = run(job, tmp_path / "rows before", killed=job.world - 1, last=last)
    assert set(before) <= set(expected) and max(before)[0] >= per_epoch, "it came to the second epoch"
    saved = whole_steps(job.checkpoints)[-1]
    assert 0 < saved < LAST and saved * ROWS <= last
    for other in others:
        shutil.copytree(job.run, tmp_path / other)
        elsewhere = make(conversations, other, other, order)
        assert run(elsewhere, tmp_path / f"rows of {other}") == expected[saved * ROWS :]
        losses = [[line["loss"] for line in read_metrics(each.run) if "loss" in line] for each in (elsewhere, whole)]
        assert len(losses[0]) == LAST and losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert run(job, tmp_path / "rows after") == expected[saved * ROWS :]
    assert_same_end(job, whole, LAST)


def test_the_same_rows_after_a_kill_in_the_second_epoch(conversations: Path) -> None:
    killed_and_resumed(conversations, "dp2", "shuffled", ["single"])


@pytest.mark.slow
@pytest.mark.parametrize("layout, order, others", [("dp2", "short_to_long", ["pp2", "dp2, larger"]), ("pp2", "shuffled", [])])
def test_the_same_rows_in_other_orders_and_layouts(conversations: Path, layout: str, order: str, others: Sequence[str]) -> None:
    killed_and_resumed(conversations, layout, order, others)
