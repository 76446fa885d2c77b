"""A stage with noise and penalties: against transformers with the same noise, against differences, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_llm.hf.reader import HFFolder
from megatron_llm.models.regularization import Regularization
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.random import stream_key
from tests.decoders import DECODERS
from tests.families.cases import cases, make_folder
from tests.families.models import DOCUMENTS, gradients_of_stage, logical_gradients, our_model, packed_batch
from tests.ops.test_noise import fields, masks
from tests.runs import config_of, stage_of

ROWS = (41, 2**35)  # of the packed batch's 36 tokens


def _addresses() -> list[int]:
    length = sum(DOCUMENTS) // len(ROWS)
    return [row * length + place for row in ROWS for place in range(length)]


class _Noise:
    """What hooks add to a model of transformers that sees one document at a time."""

    def __init__(self, chosen: Regularization, width: int):
        self.chosen, self.width = chosen, width
        self.span = slice(0)

    def dropout(self, site: str, layer: int) -> Callable[..., Any]:
        mask = masks(
            stream_key(self.chosen.seed, "dropout", site, layer), _addresses(), self.width, self.chosen.dropout[layer]
        ).float()

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            out = output[0] if isinstance(output, tuple) else output
            dropped = out * mask[self.span]
            return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

        return hook

    def neftune(self) -> Callable[..., Any]:
        numbers = [fields(stream_key(self.chosen.seed, "neftune"), address, self.width, 32) for address in _addresses()]
        uniform = (torch.tensor(numbers, dtype=torch.float64) / 2**31).float()

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            tokens, hidden = output.shape[-2:]
            return output + uniform[self.span] * self.chosen.neftune_noise_alpha / math.sqrt(tokens * hidden)

        return hook


def _hook(hf: Any, noise: _Noise) -> None:
    hf.get_input_embeddings().register_forward_hook(noise.neftune())
    for index, layer in enumerate(hf.base_model.layers):
        if hasattr(layer, "attention"):  # GPT-NeoX with both side by side: one mask on their sum is the same one on each
            sites = {"attention": "mlp", "mlp": "mlp"}
        elif hasattr(layer, "post_feedforward_layernorm"):  # Gemma 2: behind the norm of what is added
            sites = {"post_attention_layernorm": "attention", "post_feedforward_layernorm": "mlp"}
        else:
            sites = {"self_attn": "attention", "mlp": "mlp"}
        for name, site in sites.items():
            getattr(layer, name).register_forward_hook(noise.dropout(site, index))


def _reference(hf: Any, batch: Batch, noise: _Noise) -> tuple[Tensor, Tensor]:
    """(objective, weighted cross-entropy) of transformers with every document alone."""
    logits, start, chosen = [], 0, noise.chosen
    for tokens in batch.tokens_T.split(DOCUMENTS):
        noise.span = slice(start, start := start + len(tokens))
        logits.append(hf(tokens[None], use_cache=False).logits[0])
    logits_TV = torch.cat(logits)
    smoothed = functional.cross_entropy(logits_TV, batch.labels_T, reduction="none", label_smoothing=chosen.label_smoothing)
    plain = functional.cross_entropy(logits_TV, batch.labels_T, reduction="none")
    objective = smoothed + chosen.z_loss * logits_TV.logsumexp(-1).square()
    return (objective * batch.weights_T).sum(), (plain * batch.weights_T).sum()


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma2"])
def test_objective_and_gradients_equal_transformers_with_the_same_noise(tmp_path: Path, name: str) -> None:
    """The masks are made from the published generator, the objective by torch on whole logits."""
    hf = make_folder(cases()[name], tmp_path)
    folder = HFFolder(tmp_path)
    stage = our_model(folder)
    batch = dataclasses.replace(packed_batch(stage.model.vocab_size), rows=ROWS)
    chosen = Regularization(5, (0.0, 0.2, 0.4), 15.0, 0.1, 1e-2)
    noise = _Noise(chosen, stage.model.hidden_size)
    _hook(hf, noise)
    expected, plain = _reference(hf, batch, noise)
    expected.backward()
    objective, loss = stage.objective(stage(None, batch, regularization=chosen), batch, chosen)
    objective.backward()
    quiet = stage(None, batch)
    assert (stage(None, batch, regularization=chosen) - quiet).norm() > 0.1 * quiet.norm(), "the noise matters"
    torch.testing.assert_close(objective, expected, atol=0, rtol=1e-4)
    torch.testing.assert_close(loss, plain, atol=0, rtol=1e-4)
    found, wanted = gradients_of_stage(stage), logical_gradients(hf, folder, stage.model)
    assert found.keys() == wanted.keys()
    floor = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())
    for tensor, gradient in wanted.items():
        assert (found[tensor] - gradient).norm() <= 1e-3 * max(float(gradient.norm()), floor), tensor


def _tiny(**regularization: Any) -> tuple[Any, Regularization | None, Batch]:
    """A model of two layers in float64, what it is trained with, and a batch of two rows."""
    config = config_of(model={"num_hidden_layers": 2}, training={"sequence_length": 6, "regularization": regularization})
    stage = stage_of(config, range(2), True, True, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in stage.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    tokens = torch.randint(0, config.model.vocab_size, (12,), generator=generator)
    batch = Batch(
        tokens,
        tokens.roll(1),
        torch.rand(12, generator=generator),
        torch.tensor([*range(4), 0, 1, *range(6)]),
        (0, 4, 6, 12),
        rows=(3, 9),
    )
    return stage, Regularization.of(config), batch


ALL: dict[str, Any] = {"hidden_dropout": 0.3, "neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2}


def test_gradients_are_differences() -> None:
    """Along a random direction of each weight, with the noise held fixed by its counters; dropout of rate 0.3 in both layers."""
    stage, chosen, batch = _tiny(**ALL)

    def objective() -> Tensor:
        return stage.objective(stage(None, batch, regularization=chosen), batch, chosen)[0]

    objective().backward()
    for name, parameter in stage.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            step, around = 1e-5, []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                around.append(objective())
                parameter.sub_(direction, alpha=sign * step)
        difference = (around[0] - around[1]) / (2 * step)
        assert difference.item() == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("key", ALL)
def test_each_setting_changes_the_objective_and_none_of_it_nothing(key: str) -> None:
    stage, chosen, batch = _tiny(**{key: ALL[key]})
    plain, _, _ = _tiny()
    assert Regularization.of(config_of()) is None
    with torch.no_grad():
        without = stage.loss(stage(None, batch), batch)
        objective, loss = stage.objective(stage(None, batch, regularization=chosen), batch, chosen)
        assert abs(objective - without) > 1e-6 * without
        assert torch.equal(loss, without) == (key in ("label_smoothing", "z_loss"))
        nothing = Regularization(7, (0.0, 0.0))
        off, same = stage.objective(stage(None, batch, regularization=nothing), batch, nothing)
        assert torch.equal(off, without) and torch.equal(same, without)


def test_rates_rise_from_zero_to_the_whole_rate() -> None:
    """As torch.linspace, which Megatron's --lima-dropout calls; the key gives all layers the rate unless told."""
    for layers in (2, 5, 32):
        config = config_of(
            model={"num_hidden_layers": layers},
            training={"regularization": {"hidden_dropout": 0.3, "hidden_dropout_profile": "rising"}},
        )
        chosen = Regularization.of(config)
        assert chosen is not None
        assert chosen.dropout == pytest.approx(torch.linspace(0, 0.3, layers, dtype=torch.float64).tolist(), rel=1e-12)
    chosen = Regularization.of(config_of(training={"regularization": {"hidden_dropout": 0.1}}))
    assert chosen is not None and chosen.dropout == (0.1,) * 5


@pytest.mark.parametrize("decoder", ["gemma2", "bloom", "opt"])
def test_noise_on_embeddings_is_its_formula(decoder: str) -> None:
    """alpha / sqrt(L H) times numbers from [-1, 1), with L of the document; behind a multiplier, before positions and norms."""
    config = config_of(model=DECODERS[decoder], training={"regularization": {"neftune_noise_alpha": 7.0}, "seed": 11})
    stage = stage_of(config, range(0), True, False, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in stage.parameters():
        parameter.data.normal_(generator=generator)
    ids, hidden = torch.arange(12), config.model.hidden_size
    batch = Batch(ids, ids, torch.ones(12), torch.tensor([*range(5), *range(7)]), (0, 5, 12), rows=(100,))
    numbers = [fields(stream_key(11, "neftune"), 1200 + place, hidden, 32) for place in range(12)]
    length = torch.tensor([5.0] * 5 + [7.0] * 7, dtype=torch.float64)[:, None]
    noise = torch.tensor(numbers, dtype=torch.float64) / 2**31 * 7.0 / (length * hidden).sqrt()
    with torch.no_grad():
        found = stage(None, batch, regularization=Regularization.of(config))
        stage.embedding.weight.data[:12] += noise / config.model.embedding_multiplier
        torch.testing.assert_close(found, stage(None, batch), rtol=1e-12, atol=1e-12)
