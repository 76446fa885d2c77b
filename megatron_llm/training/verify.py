"""Proof that this engine computes what transformers computes with a Hugging Face folder. Called by `cli/verify.py`.

Both read the same documents: transformers each alone, this engine all of them packed, on one process and in any layouts that are
asked for. What is compared: every logit, the loss, and the most likely token.

The rule. The largest difference of a logit, as a part of the largest logit of transformers, may be; and so may that of the mean
loss, as a part of the loss:

    float32     0.0001, against transformers in float32. Sums in another order differ by a tenth of that or less
    bfloat16    three times what transformers in bfloat16 differs by, against transformers in float32: rounding depends too much
                on depth and weights for a number, and this engine rounds no more often than transformers does

It has no absolute lower bound, as small random models have small logits. transformers is made first, and gone before ours
is: the command needs memory for one of them, and for two copies of the logits.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_llm.config import ModelConfig
from megatron_llm.hf.config_reader import ConfigReader
from megatron_llm.hf.reader import HFFolder
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.objects import all_gather_objects
from megatron_llm.training.agreement import AgreedError
from megatron_llm.training.build import DTYPES, build_model
from megatron_llm.training.distributed import launched_rank, launched_world_size, pick_device, process_group
from megatron_llm.training.spawn import run_ranks
from megatron_llm.training.verify_layouts import Layout, logits_of_layout, parse_layouts
from megatron_llm.training.verify_reference import Outputs, attention_of, class_of, corrections, reference
from megatron_llm.training.verify_text import Documents, make_documents

FLOAT32_TOLERANCE = 1e-4
BFLOAT16_FACTOR = 3.0
_ROWS = 64  # of logits that are compared at a time

Say = Callable[[str], object]


@dataclass(frozen=True)
class Request:
    """What is to be verified; the fields are those of the command line.

    Attributes:
        tolerance: the largest difference, as a part of the largest logit or the loss; None: by the rule.
        timeout_seconds: limit on a layout, and on every wait of one rank for another.
    """

    folder: str
    layouts: tuple[str, ...] = ()
    text: str | None = None
    tokens: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    tolerance: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: float = 1800.0


@dataclass(frozen=True)
class Comparison:
    """How far outputs are from transformers' in float32.

    Attributes:
        most, mean: absolute difference of logits; place: (token, id) of the largest.
        loss, expected_loss: of these outputs; of transformers'.
        same: tokens after which both find the same token most likely.
        largest: absolute value of transformers' logits.
    """

    most: float
    mean: float
    place: tuple[int, int]
    loss: float
    expected_loss: float
    same: int
    largest: float

    @property
    def loss_difference(self) -> float:
        return abs(self.loss - self.expected_loss)

    @property
    def relative(self) -> float:
        """What is judged: the larger of the two parts, of the largest logit and of the loss; nan if a number is not finite."""
        parts = ((self.most, self.largest), (self.loss_difference, self.expected_loss))
        return float(torch.tensor([part and part / whole for part, whole in parts]).max())  # nan if one is


def compare(expected: Outputs, found: Outputs) -> Comparison:
    """`found` against transformers'."""
    assert found.logits_TV.shape == expected.logits_TV.shape, (found.logits_TV.shape, expected.logits_TV.shape)
    most, place, total, same, largest = torch.tensor(-1.0), (0, 0), 0.0, 0, torch.tensor(0.0)
    rows = zip(expected.logits_TV.split(_ROWS), found.logits_TV.split(_ROWS), strict=True)
    for number, (expected_RV, found_RV) in enumerate(rows):
        differences_RV = (found_RV - expected_RV).abs()
        row, id_ = divmod(int(differences_RV.argmax()), differences_RV.shape[1])  # a nan is larger than any number
        if not bool(differences_RV[row, id_] <= most) and not bool(most.isnan()):
            most, place = differences_RV[row, id_], (number * _ROWS + row, id_)
        total += float(differences_RV.sum(dtype=torch.float64))
        same += int((found_RV.argmax(-1) == expected_RV.argmax(-1)).sum())
        largest = torch.maximum(largest, expected_RV.abs().max())
    mean = total / expected.logits_TV.numel()
    return Comparison(float(most), mean, place, found.loss, expected.loss, same, float(largest))


def verify(request: Request, say: Say = print) -> list[str]:
    """Compare, say every result when it is there, and return a sentence for each model or layout that differs: none is a proof.

    Collective where a launcher has started ranks. Raises ValueError for a folder or an option that cannot be used, before
    anything is computed.
    """
    world = launched_world_size()
    if world > 1 and not request.layouts:
        raise ValueError("without --layouts verify runs in one process; start it without torchrun")
    if request.tolerance is not None and not request.tolerance >= 0:
        raise ValueError(f"--tolerance {request.tolerance} must be 0 or more")
    if not 0 < request.timeout_seconds <= 1e7:
        raise ValueError(f"--timeout {request.timeout_seconds:g} must be more than 0 and at most 1e7 seconds")
    folder = HFFolder(request.folder)
    model = ModelConfig(**folder.model_fields())
    layouts = parse_layouts(request.layouts, model, world)
    folder.source(model)  # raises if the files are not whole
    class_of(folder)
    documents = make_documents(folder.path, model, None if request.text is None else Path(request.text), request.tokens)
    device = pick_device(request.device)
    if world == 1:
        return _Verification(request, folder, model, documents, device, say).run(layouts)
    with process_group(device, request.timeout_seconds):
        me = launched_rank()
        verification = _Verification(request, folder, model, documents, device, say if me == 0 else _silent)
        return verification.run(layouts, Axis("world", me, world, tuple(range(world)), torch.distributed.group.WORLD))


def _silent(said: str) -> None:
    """What ranks above 0 say."""


class _Verification:
    """One call of `verify`. The first rank has transformers' outputs and compares; it may be the only one."""

    def __init__(
        self, request: Request, folder: HFFolder, model: ModelConfig, documents: Documents, device: torch.device, say: Say
    ):
        self.request, self.folder, self.model = request, folder, model
        self.documents, self.device, self.say = documents, device, say
        self.problems: list[str] = []

    def run(self, layouts: list[Layout], world: Axis = Axis("world")) -> list[str]:
        self._agreed(world, self._one_process)
        for layout in layouts:
            config = layout.config(self.model, self.documents.tokens, self.request.dtype, self.request.timeout_seconds)
            arguments = (str(self.folder.path), config, self.documents)
            compute = logits_of_layout if world.size > 1 else partial(self._spawned, layout)
            found = compute(*arguments, str(self.device) if world.size > 1 else "cpu")
            if found is not None:
                self._judge(layout.name, Outputs(torch.from_numpy(found[0]), found[1]))
        return list(all_gather_objects(self.problems, world)[0])

    def _spawned(self, layout: Layout, *arguments: object) -> Any:
        try:
            return run_ranks(layout.ranks, logits_of_layout, *arguments, timeout_seconds=self.request.timeout_seconds)
        except (ValueError, RuntimeError) as error:
            error.add_note(f"in layout {layout.name}")
            raise

    def _agreed(self, world: Axis, work: Callable[[], None]) -> None:
        """Let the first rank work, while others wait. All raise its ValueError."""
        error = None
        if world.first:
            try:
                work()
            except ValueError as mistake:
                error = mistake
        if message := all_gather_objects(None if error is None else str(error), world)[0]:
            raise AgreedError(message) from error

    def _one_process(self) -> None:
        """transformers, then this engine on one process."""
        import transformers

        for line in self._heading(transformers.__version__):
            self.say(line)
        self.expected = reference(self.folder, self.model, self.documents, torch.float32, self.device)
        self.tolerance = self.request.tolerance
        self.say(f"{'':<24}{'difference of logits':>22}{'':>14}{'difference':>11}   same token")
        self.say(f"{'':<24}{'largest':>11}{'mean':>11}{'loss':>14}{'of loss':>11}   most likely")
        self.say(f"{'transformers float32':<24}{'':>22}{self.expected.loss:>14.6f}")
        if self.request.dtype == "bfloat16":
            found = compare(self.expected, reference(self.folder, self.model, self.documents, torch.bfloat16, self.device))
            self._line("transformers bfloat16", found)
            if self.tolerance is None:
                self.tolerance = BFLOAT16_FACTOR * found.relative
        elif self.tolerance is None:
            self.tolerance = FLOAT32_TOLERANCE
        self._judge("one process", self._alone())

    def _heading(self, version: str) -> Iterable[str]:
        folder, documents = self.folder, self.documents
        layers = self.model.num_hidden_layers
        yield f"{folder.path}: {folder.family.architecture}, {layers} layers, {self.request.dtype} on {self.device}"
        lengths = [len(document) for document in documents.ids]
        yield f"against transformers {version}, {attention_of(folder)} attention, each document alone"
        yield f"text: {documents.tokens} tokens in {len(lengths)} documents of {lengths[0]} to {lengths[-1]}; {documents.origin}"
        notes = [*ConfigReader(folder.config).notes(), *corrections(self.model), *_not_reached(self.model, lengths[-1])]
        yield from (f"note: {note}" for note in notes)

    @torch.no_grad()
    def _alone(self) -> Outputs:
        stage = build_model(self.model, self.folder.source(self.model), DTYPES[self.request.dtype], self.device)
        batch = self.documents.batch().to(self.device)
        hidden = stage(None, batch)
        loss = stage.loss(hidden, batch) / batch.weights_T.sum()
        return Outputs(stage.logits(hidden).float().cpu(), float(loss))

    def _judge(self, name: str, outputs: Outputs) -> None:
        """Compare, say so, and note what is wrong."""
        found = compare(self.expected, outputs)
        self._line(name, found)
        assert self.tolerance is not None
        if found.relative <= self.tolerance:
            return
        token, id_ = found.place
        self.problems.append(
            f"{name}: a logit differs from transformers by {found.most:.3g} (id {id_} after {self.documents.place(token)}), "
            f"the loss by {found.loss_difference:.3g}. The largest logit is {found.largest:.4g}, the loss "
            f"{found.expected_loss:.4g}: {found.relative:.3g} of that, and {self.tolerance:.3g} is allowed"
        )

    def _line(self, name: str, found: Comparison) -> None:
        same = f"{found.same} of {self.documents.tokens}"
        self.say(f"{name:<24}{found.most:>11.2e}{found.mean:>11.2e}{found.loss:>14.6f}{found.loss_difference:>11.2e}   {same}")


def _not_reached(model: ModelConfig, longest: int) -> Iterable[str]:
    """What in the model acts on documents longer than those that are compared, a sentence each."""
    if model.sliding_window is not None and longest <= model.sliding_window:
        yield f"the sliding window of {model.sliding_window} tokens hides nothing in {longest}; --tokens takes more"
    scaling = model.rope_scaling
    if scaling is not None and scaling.by_length and longest <= scaling.original_max_position_embeddings:
        pretrained = scaling.original_max_position_embeddings
        yield f"rope scaling {scaling.rope_type} begins beyond {pretrained} tokens, not in {longest}; --tokens takes more"
