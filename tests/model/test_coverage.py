"""What is pruned unless the caller chooses, and what is said of the rest."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
from state import unchanged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.pytorch_utils import Conv1D

from force_plugin import (
    NothingToPruneError,
    SparsityReport,
    apply_masks,
    diagnose,
    force_prune,
    get_masks,
    load_pruned_state_dict,
    make_permanent,
    saliency,
    sparsity_report,
)
from force_plugin.model.linear_like import looks_up, output_axis
from force_plugin.model.weights import named_parameters


def module(
    forward: Callable[..., Any], *shape: int, **attributes: Any
) -> Callable[[], nn.Module]:
    """A module of somebody's own, with a matrix of zeros."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(shape))
            for key, value in attributes.items():
                setattr(self, key, value)

    Own.forward = forward
    return Own


class Lora(nn.Module):
    """A frozen matrix, and one of rank 2 that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(30, 40), requires_grad=False)
        self.down = nn.Linear(40, 2, bias=False)
        self.up = nn.Linear(2, 30, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.up(self.down(self.dropout(x)))


class Sub(Conv1D):
    """A subclass of transformers' own."""


def _round_trip(s: Any, x: Tensor) -> Tensor:
    return s.weight[torch.cdist(x, s.weight).argmin(-1)]


# The axis of the outputs, or None where the matrix is no factor of a product.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "conv1d": (lambda: Conv1D(7, 5), 1),
    "conv1d_square": (lambda: Conv1D(5, 5), 1),
    "conv1d_one_input": (lambda: Conv1D(7, 1), 1),
    "conv1d_one_output": (lambda: Conv1D(1, 7), 1),
    "conv1d_subclass": (lambda: Sub(7, 5), 1),
    "linear": (module(lambda s, x: F.linear(x, s.weight), 7, 5), 0),
    "linear_square": (module(lambda s, x: F.linear(x, s.weight), 5, 5), 0),
    "linear_one_input": (module(lambda s, x: F.linear(x, s.weight), 5, 1), 0),
    "linear_one_output": (module(lambda s, x: F.linear(x, s.weight), 1, 5), 0),
    "matmul": (module(lambda s, x: x @ s.weight, 7, 5), 1),
    "matmul_square": (module(lambda s, x: x @ s.weight, 5, 5), 1),
    "matmul_transposed": (module(lambda s, x: x @ s.weight.t(), 7, 5), 0),
    "einsum": (module(lambda s, x: torch.einsum("bi,io->bo", x, s.weight), 7, 5), 1),
    "einsum_tokens": (
        module(lambda s, x: torch.einsum("bti,oi->bto", x, s.weight), 7, 5),
        0,
    ),
    "channels_first": (
        module(lambda s, x: torch.einsum("oc,bct->bot", s.weight, x), 7, 5),
        0,
    ),
    "equalised": (
        module(lambda s, x: F.leaky_relu(F.linear(x, s.weight * s.gain)), 7, 5, gain=3),
        0,
    ),
    "relu": (module(lambda s, x: F.relu(F.linear(x, s.weight)), 5, 5), 0),
    "gated": (module(lambda s, x: F.glu(F.linear(x, s.weight)), 8, 5), 0),
    "softmax": (module(lambda s, x: F.log_softmax(x @ s.weight, -1), 5, 8), 1),
    "normalised_input": (
        module(lambda s, x: F.linear(F.layer_norm(x, (5,)), s.weight), 8, 5),
        0,
    ),
    "two_results": (module(lambda s, x: (F.linear(x, s.weight), None), 8, 5), 0),
    "lora": (Lora, 0),
    "router": (
        lambda: MixtralTopKRouter(MixtralConfig(hidden_size=8, num_local_experts=4)),
        0,
    ),
    # What is none.
    "embedding": (lambda: nn.Embedding(9, 5), None),
    "own_embedding": (module(lambda s, x: F.embedding(x, s.weight), 9, 5), None),
    "rows": (module(lambda s, x: s.weight[x], 9, 5), None),
    "positions": (module(lambda s, x: x + s.weight[: x.shape[1]], 9, 5), None),
    "positions_square": (module(lambda s, x: x + s.weight[: x.shape[1]], 5, 5), None),
    "positions_of_samples": (module(lambda s, x: x + s.weight, 3, 5), None),
    "mean_of_a_table": (module(lambda s, x: x + s.weight.mean(0), 5, 5), None),
    "distances": (module(lambda s, x: torch.cdist(x, s.weight), 9, 5), None),
    "distances_square": (module(lambda s, x: torch.cdist(x, s.weight), 5, 5), None),
    "codebook": (module(_round_trip, 9, 5), None),
    "codebook_square": (module(_round_trip, 5, 5), None),
    "attended_codebook": (
        module(lambda s, x: F.softmax(x @ s.weight.t(), -1) @ s.weight, 5, 5),
        None,
    ),
    "scale": (module(lambda s, x: x * s.weight, 1, 5), None),
    "scale_of_channels": (module(lambda s, x: x * s.weight, 5, 1), None),
    "scale_of_one": (module(lambda s, x: x * s.weight, 1, 1), None),
    "scale_and_shift": (module(lambda s, x: x * s.weight[0] + s.weight[1], 2, 5), None),
    "layer_norm": (lambda: nn.LayerNorm((4, 5)), None),
    "own_layer_norm": (
        module(lambda s, x: F.layer_norm(x, (4, 5)) * s.weight, 4, 5),
        None,
    ),
    "cosines": (
        module(lambda s, x: F.linear(F.normalize(x), F.normalize(s.weight)), 7, 5),
        None,
    ),
    "two_arguments": (module(lambda s, x, graph: graph @ (x @ s.weight), 7, 5), None),
    "never_called": (module(lambda s: s.weight, 7, 5), None),
    "nothing": (module(lambda s, x: x, 7, 5), None),
}
TABLES = {"embedding", "own_embedding", "rows"}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_what_multiplies_by_its_matrix(case: str) -> None:
    make, expected = LAYERS[case]
    model = make()
    assert output_axis(model, "weight") == expected
    assert looks_up(model, "weight") == (case in TABLES)
    (weight,) = (w for n, w in named_parameters(model).items() if n == "weight")
    assert weight.prunable == (expected is not None)
    rows = weight.dense.t() if expected == 1 else weight.dense
    assert weight.shape == rows.shape == weight.rows(weight.dense).shape


@pytest.mark.parametrize("case", ["conv1d", "linear", "lora", "own_embedding"])
@pytest.mark.parametrize(
    "state",
    [
        lambda model: model,
        lambda model: model.bfloat16(),
        lambda model: model.to("meta"),
        lambda model: model.train(),
        lambda model: (
            apply_masks(
                model, {"weight": torch.ones_like(model.weight, dtype=torch.bool)}
            )
            or model
        ),
        lambda model: prune.l1_unstructured(model, "weight", 0.5) and model,
    ],
    ids=["float32", "bfloat16", "meta", "training", "masked", "pruned"],
)
def test_a_layer_is_one_in_every_state(case: str, state: Callable[[Any], Any]) -> None:
    make, expected = LAYERS[case]
    assert output_axis(state(make()), "weight") == expected


class Stubborn(nn.Module):
    """Notes everything that happens to it."""

    seen: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(4)
        self.seen = []
        self.count = 0
        self.last: Tensor | None = None
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        self.seen.append(x)
        noise = torch.randn(x.shape, generator=self.generator) + torch.rand(x.shape)
        self.last = self.norm(F.linear(x, self.weight)) + 0 * noise
        return self.last


def test_a_module_is_not_called_to_see_what_it_is() -> None:
    model = Stubborn()
    model.register_forward_pre_hook(lambda *args: pytest.fail("it was called"))
    model.norm.register_forward_hook(lambda *args: pytest.fail("a part was called"))
    with unchanged(model):
        drawn = model.generator.get_state()
        assert output_axis(model, "weight") == 0
        assert (model.count, model.seen, model.last) == (0, [], None)
        assert torch.equal(model.generator.get_state(), drawn)


def test_instances_of_a_class_may_differ() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        mode = self.mode if isinstance(self.mode, str) else self.mode["mode"]
        product = F.linear(x, self.weight)
        return product if mode == "product" else torch.cdist(x, self.weight)

    make = module(forward, 7, 5)
    found = []
    for mode in ("product", "distance", {"mode": "product"}, {"mode": "distance"}):
        model: Any = make()
        model.mode = mode
        found.append(output_axis(model, "weight"))
    assert found == [0, None, 0, None]


# Whole models.

TOKENS = torch.arange(64).view(4, 16) * 7 % 99
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = model(**batch).loss
    return result


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, **sizes, **ends, **options))


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return BertForMaskedLM(
        BertConfig(vocab_size=500, hidden_size=32, max_position_embeddings=32, **sizes)
    )


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config(vocab_size=99, **sizes))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_local_experts": 4,
    }
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_key_value_heads=2,
            **sizes,
        )
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], float, dict[str, int]]] = {
    "gpt2": (gpt2, 0.854, {"Embedding tied to Linear": 3168, "Embedding": 1024}),
    "gpt2_untied": (
        lambda: gpt2(tie_word_embeddings=False),
        0.869,
        {"Embedding": 3168 + 1024},
    ),
    "bert": (bert, 0.350, {"Embedding tied to Linear": 16_000, "Embedding": 1088}),
    "t5": (t5, 0.857, {"Embedding tied to Linear": 3168, "Embedding": 256}),
    "mixtral": (mixtral, 0.187, {"MixtralExperts": 24_576, "Embedding": 3168}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["force", "random"])
def test_the_share_that_is_pruned_is_said(name: str, method: str) -> None:
    make, share, passed = MODELS[name]
    model = make()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = force_prune(
            model, [BATCH], 0.8, steps=2, method=method, forward=loss, progress=False
        )
    assert report.coverage == pytest.approx(share, abs=5e-4)
    assert report.passed_over == passed
    total = report.total + sum(passed.values())
    assert f"{100 * share:.1f} % of the model's matrix and kernel weights" in flat(
        report
    )
    assert f"({report.total:,} of {total:,})" in flat(report)
    for kind, count in passed.items():
        assert f"{kind} {count:,}" in flat(report)
    below = [w for w in said if "matrix and kernel weights" in str(w.message)]
    listed = [w for w in report.warnings if "matrix and kernel weights" in w]
    assert (len(below), len(listed)) == ((1, 1) if share < 0.5 else (0, 0))
    for one in below:
        assert issubclass(one.category, UserWarning)
        assert all(kind in str(one.message) for kind in passed)
    assert json.loads(json.dumps(report.to_dict()))["passed_over"] == passed
    again = sparsity_report(model)
    assert (again.coverage, again.passed_over) == (report.coverage, passed)
    assert not again.warnings


def flat(report: object) -> str:
    """A report without its line breaks."""
    return " ".join(str(report).split())


@pytest.mark.parametrize("name", MODELS)
def test_a_diagnosis_says_the_share_too(name: str) -> None:
    make, share, passed = MODELS[name]
    model = make()
    with unchanged(model):
        diagnosis = diagnose(model, [BATCH], forward=loss)
    assert diagnosis.coverage == pytest.approx(share, abs=5e-4)
    assert diagnosis.passed_over == passed
    assert f"{100 * share:.1f} % of the model's matrix and kernel" in flat(diagnosis)
    found = [f for f in diagnosis.findings if "matrix and kernel" in f]
    assert len(found) == (share < 0.5)
    assert max(map(len, str(diagnosis).splitlines())) <= 80
    plain = json.loads(json.dumps(diagnosis.to_dict()))
    assert (plain["passed_over"], plain["coverage"]) == (passed, diagnosis.coverage)
    # Who names what is to be pruned knows what is not.
    pairs = [(m, "weight") for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if pairs:
        chosen = diagnose(model, [BATCH], forward=loss, parameters=pairs[:1])
        assert not [f for f in chosen.findings if "matrix and kernel" in f]


def test_conv1d_is_pruned_by_every_method_and_held() -> None:
    model = gpt2()
    blocks = {n for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n}
    before = saliency(copy.deepcopy(model).eval(), [BATCH], forward=loss)
    assert before.keys() == blocks
    # Its definition, in four lines.
    loss(model.eval(), BATCH).backward()
    for name, score in before.items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(score, (weight * weight.grad).abs().detach())
    model.zero_grad()
    model.train()
    force_prune(model, [BATCH], 0.9, steps=2, forward=loss, progress=False)
    fresh = gpt2()
    load_pruned_state_dict(fresh, model.state_dict())
    make_permanent(fresh)
    optimizer = torch.optim.Adam(fresh.parameters(), 0.01)
    for _ in range(2):
        loss(fresh, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = sparsity_report(fresh)
    assert {layer.name for layer in report.layers} == blocks
    assert report.sparsity == pytest.approx(0.9, abs=1e-3)


def test_the_gate_of_a_transposed_matrix_is_opened_by_its_inputs() -> None:
    """Weights of 0 become PyTorch's initialisation: uniform in ±1 / √inputs."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(Conv1D(8, 400), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    scores = saliency(
        model, [(torch.ones(3, 400), torch.arange(3))], "magnitude", open_gates=True
    )
    assert not scores["0.weight"].any()
    from force_plugin.scoring.passes import Passes
    from force_plugin.scoring.probe import Probe

    weights = list(named_parameters(model).values())
    layers = [weight for weight in weights if weight.prunable]
    with Probe(model, layers, [], Passes(open_gates=True)) as probe:
        assert list(probe.gates) == ["0.weight"]
        assert probe.weights["0.weight"].abs().max() == pytest.approx(0.05, rel=0.02)


def tied(kind: str) -> nn.Module:
    torch.manual_seed(0)
    embedding: nn.Module = {
        "embedding": lambda: nn.Embedding(9, 5),
        "bag": lambda: nn.EmbeddingBag(9, 5),
        "own": module(lambda s, x: F.embedding(x, s.weight), 9, 5),
        "indexing": module(lambda s, x: s.weight[x], 9, 5),
        "linear": lambda: nn.Linear(5, 9),
    }[kind]()
    nn.init.normal_(embedding.weight)  # type: ignore[arg-type]
    model = nn.ModuleDict({"embed": embedding, "body": nn.Linear(5, 5)})
    model["head"] = nn.Linear(5, 9, bias=False)
    model["head"].weight = embedding.weight
    return model


@pytest.mark.parametrize("kind", ["embedding", "bag", "own", "indexing", "linear"])
@pytest.mark.parametrize("first", ["embed", "head"])
def test_a_weight_that_an_embedding_has_is_left_out_unless_it_is_named(
    kind: str, first: str
) -> None:
    model = tied(kind)
    if first == "head":
        model = nn.ModuleDict(dict(reversed(list(model.items()))))
    assert isinstance(model, nn.ModuleDict)
    names = {layer.name for layer in sparsity_report(model).layers}
    assert names == {"body.weight"} | (
        {f"{first}.weight"} if kind == "linear" else set()
    )
    for owner in ("embed", "head"):
        twin = copy.deepcopy(model)
        report = force_prune(
            twin,
            [],
            0.5,
            method="magnitude",
            parameters=[(twin[owner], "weight")],
            progress=False,
        )
        assert [layer.name for layer in report.layers] == [f"{first}.weight"]
        assert int((twin["embed"].weight == 0).sum()) == 23
        # What is pruned is reported.
        assert f"{first}.weight" in [one.name for one in sparsity_report(twin).layers]


NOTHING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "empty": (lambda: nn.Sequential(nn.ReLU()), "linear weight; name what"),
    "embedding": (lambda: nn.Embedding(4, 3), "was passed over: Embedding 12$"),
    "recurrent": (
        lambda: nn.Sequential(nn.Embedding(4, 3), nn.GRU(3, 3)),
        "among what was passed over: GRU 54, Embedding 12$",
    ),
    "tied": (
        lambda: nn.ModuleDict({"e": (m := tied("embedding"))["embed"], "h": m["head"]}),
        "among what was passed over: Embedding tied to Linear 45$",
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_model_without_anything_to_prune_says_what_it_has(case: str) -> None:
    make, message = NOTHING[case]
    model = make()
    with unchanged(model), pytest.raises(NothingToPruneError, match=message) as info:
        force_prune(model, [], 0.5, method="random", progress=False)
    assert info.value.advice.startswith("name what to prune with parameters=")


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = getattr(nn, kind)(8, 16, batch_first=True, **options)
        self.head = nn.LazyLinear(3)
        self(torch.zeros(1, 2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        ("RNN", {}, 384),
        ("GRU", {}, 1152),
        ("LSTM", {"num_layers": 2}, 3584),
        ("GRU", {"bidirectional": True}, 2304),
        ("LSTM", {"proj_size": 4}, 832),
    ],
)
def test_a_recurrent_layer_is_passed_over_and_can_be_named(
    kind: str, options: dict[str, Any], count: int
) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind, **options)
    batch = (torch.arange(30).view(6, 5) % 20, torch.arange(6) % 3)
    twin = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match=rf"passed over: {kind} {count:,}, Embedding 160"
    ):
        force_prune(twin, [batch], 0.5, steps=2, progress=False)
    pairs = [(model.rnn, n) for n, _ in model.rnn.named_parameters() if "weight" in n]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = force_prune(
            model, [batch], 0.5, steps=2, parameters=pairs, progress=False
        )
    assert report.passed_over == {
        "Embedding": 160,
        "Linear": model.head.weight.numel(),
    }
    fresh = Recurrent(kind, **options)
    apply_masks(fresh, get_masks(model))
    for one in (model, fresh):
        optimizer = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            F.cross_entropy(one(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        for module, name in pairs:
            owner = one.rnn if module is model.rnn else module
            mask = getattr(owner, f"{name}_mask")
            assert not getattr(owner, name)[~mask].any()
            assert getattr(owner, f"{name}_orig")[mask].any()
    expected = model.eval()(batch[0])
    make_permanent(model)
    torch.testing.assert_close(model(batch[0]), expected)


def test_attention_is_passed_over_in_part_and_can_be_named() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    )
    model.append(nn.Flatten()).append(nn.Linear(40, 3))
    batch = (torch.randn(6, 5, 8), torch.arange(6) % 3)
    report = sparsity_report(model)
    assert report.passed_over == {"MultiheadAttention.in_proj_weight": 192}
    pairs = [(model[0].self_attn, "in_proj_weight")]
    force_prune(model, [batch], 0.5, steps=2, parameters=pairs, progress=False)
    expected = model.train()(batch[0])
    with torch.no_grad():  # takes PyTorch's fast path
        torch.testing.assert_close(model.eval()(batch[0]), expected)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    assert model[0].self_attn.in_proj_weight_orig.grad.any()


# What counts.


def holding(**parameters: tuple[int, ...]) -> nn.Module:
    model = nn.Module()
    model.fc = nn.Linear(2, 2)
    for name, shape in parameters.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return model


@pytest.mark.parametrize(
    ("parameters", "passed"),
    [
        ({"experts": (4, 3, 2)}, {"Module.experts": 24}),
        ({"experts": (4, 3, 2), "gate": (4, 2)}, {"Module": 32}),
        ({"projection": (4, 3)}, {"Module.projection": 12}),
        ({"kernel": (4, 1, 3, 3)}, {"Module.kernel": 36}),
        ({"pos_embed": (1, 9, 4)}, {}),
        ({"latents": (1, 9, 4)}, {}),
        ({"pos_embed": (9, 4)}, {}),
        ({"positional_embedding": (9, 4)}, {}),
        ({"relative_position_bias_table": (9, 4)}, {}),
        ({"rel_pos_h": (9, 4)}, {}),
        ({"attention_biases": (9, 4)}, {}),
        ({"gate_up_proj_bias": (4, 9)}, {}),
        ({"cls_token": (1, 1, 4)}, {}),
        ({"reg_token": (1, 4, 4), "mask_tokens": (3, 4)}, {}),
        ({"gamma": (4, 1, 1)}, {}),
        ({"scale": (4,), "gain": ()}, {}),
        ({"query": (1, 4)}, {}),
    ],
)
def test_what_is_added_to_activations_is_no_weight(
    parameters: dict[str, tuple[int, ...]], passed: dict[str, int]
) -> None:
    report = sparsity_report(holding(**parameters))
    assert report.passed_over == passed
    assert report.coverage == 4 / (4 + sum(passed.values()))


def test_integers_have_no_share() -> None:
    model = holding()
    codes = torch.ones(9, 9, dtype=torch.int8)
    model.codes = nn.Parameter(codes, requires_grad=False)
    assert not sparsity_report(model).passed_over


@pytest.mark.parametrize(
    ("normed", "passed"),
    [
        (nn.utils.parametrizations.weight_norm, {"ParametrizedLinear": 12}),
        (nn.utils.parametrizations.spectral_norm, {"ParametrizedLinear": 12}),
        (nn.utils.weight_norm, {"Linear.weight_v": 12}),
        (nn.utils.spectral_norm, {"Linear.weight_orig": 12}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_computed_weight_is_passed_over(
    normed: Callable[[nn.Module], nn.Module], passed: dict[str, int]
) -> None:
    model = nn.Sequential(normed(nn.Linear(4, 3)), nn.Linear(3, 3))
    assert sparsity_report(model).passed_over == passed


def test_many_types_are_counted_and_five_are_named() -> None:
    passed = {f"Kind{i}": 100 - i for i in range(8)}
    layers = sparsity_report(nn.Linear(2, 2)).layers
    text = flat(SparsityReport(layers, passed_over=passed))
    assert "Kind4 96 and 3 more types" in text
    assert "Kind5" not in text


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
        *("convnext_atto", "mixer_s32_224", "sequencer2d_s", "efficientvit_m0"),
        *("beit_base_patch16_224", "nfnet_l0", "gmixer_12_224"),
    ],
)
def test_a_timm_model_is_pruned_as_ever_and_without_a_warning(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = (nn.Conv2d, nn.Linear)
    expected = [
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, layers)
    ]
    weights = named_parameters(model)
    assert [name for name, weight in weights.items() if weight.prunable] == expected
    others = [w for w in weights.values() if w.weighs and not w.prunable]
    share = sum(weights[name].dense.numel() for name in expected)
    assert share > sum(weight.dense.numel() for weight in others)
