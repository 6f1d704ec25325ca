"""Planning from a config: the tables of the real model to the byte, no memory for weights, and refusals that name the way out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import chunkft_compile
from chunkft_compile.capture import capture
from chunkft_compile.compiled import Compiled, Setting, fixed_nbytes, layouts_of, model_nbytes
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.offline import Choices, OfflineModel, Shape, build_fake, read_config, smallest_offline
from chunkft_compile.planner import BudgetError, Chunk, Cost, Kind, Placement, Problem, Update, plan
from chunkft_compile.planner.devices import find_device
from chunkft_compile.presets import PRESETS
from chunkft_compile.runtime.chunks import split_for_budget
from chunkft_compile.runtime.precision import Precision
from chunkft_compile.runtime.precision_costs import measure_update
from chunkft_compile.solving import fingerprint
from chunkft_compile.widening import widen_gradients

CPU = torch.device("cpu")
BUDGET = 1_000_000
TINY: dict[str, Any] = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = transformers.LlamaConfig(**TINY, intermediate_size=24, max_position_embeddings=32, tie_word_embeddings=True, use_cache=False)
GPT2 = transformers.GPT2Config(
    vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, use_cache=False
)


def _timeless(problem: Problem) -> Problem:
    """Without times, which are measured anew in every run, and without what the optimizer allocates while it steps: see below."""

    def cost(old: Cost) -> Cost:
        return replace(old, forward_us=0, backward_us=0)

    def kind(old: Kind) -> Kind:
        return Kind(*(tuple(map(cost, options)) for options in (old.frozen, old.passing, old.active, old.last)))

    def chunk(old: Chunk) -> Chunk:
        return replace(old, grad_us=0, update_us=0, update_nbytes=old.state_nbytes)

    links = find_device("cpu").links
    return replace(problem, kinds=tuple(map(kind, problem.kinds)), chunks=tuple(map(chunk, problem.chunks)), links=links)


def _real_problem(model: nn.Module, costs: OperatorCosts, optimizer: Any, precision: Precision) -> Problem:
    """What a training call would plan on."""
    ids = torch.zeros(2, 10, dtype=torch.int64)
    found = widen_gradients(capture(model.train(), (), {"input_ids": ids, "labels": ids}), precision)
    chunks = split_for_budget(model, BUDGET, wide=precision is not Precision.PLAIN)
    cost = measure_update(optimizer, layouts_of(chunks), CPU, precision)
    setting = Setting(BUDGET, chunks, cost, find_device("cpu").links, precision=precision)
    fixed = [torch.zeros((), requires_grad=True), ids, *(chunk.stand_in for chunk in chunks if chunk.stand_in is not None)]
    return Compiled(found, fixed_nbytes(model_nbytes(model), found, fixed), costs, setting).problem(accumulating=False)


@pytest.mark.parametrize(
    ("config", "dtype", "precision"),
    [
        pytest.param(LLAMA, torch.float32, Precision.PLAIN, id="llama"),
        *(
            pytest.param(config, dtype, precision, id=f"{config.model_type}-{dtype}-{precision}", marks=pytest.mark.slow)
            for config, dtype, precision in (
                (LLAMA, torch.bfloat16, Precision.PLAIN),
                (LLAMA, torch.bfloat16, Precision.MASTER),
                (LLAMA, torch.bfloat16, Precision.STOCHASTIC),
                (LLAMA, torch.float16, Precision.MASTER),
                (GPT2, torch.float32, Precision.PLAIN),
                (GPT2, torch.bfloat16, Precision.MASTER),
            )
        ),
    ],
)
def test_the_problem_is_that_of_the_real_model_to_the_byte(config: Any, dtype: torch.dtype, precision: Precision) -> None:
    costs = OperatorCosts(CPU)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    real = _real_problem(model, costs, torch.optim.AdamW([nn.Parameter(torch.zeros(2))], fused=True), precision)
    offline = OfflineModel(config, Shape(2, 10), dtype, find_device("cpu"), costs=costs, precision=precision)
    found = offline.problem(BUDGET, "adamw-fused", Choices())
    # its few scalars, scaled from another shape
    assert all(abs(a.update_nbytes - b.update_nbytes) <= 16 for a, b in zip(found.chunks, real.chunks, strict=True))
    # the option that no other beats may depend on times, so both come from the one table of measured operators
    assert _timeless(found) == _timeless(real)


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "precision"), [(False, Precision.PLAIN), (True, Precision.PLAIN), (False, Precision.MASTER)])
def test_a_deep_model_from_three_layers_is_that_of_a_full_capture(tied: bool, precision: Precision) -> None:
    config = transformers.LlamaConfig(
        **{**TINY, "num_hidden_layers": 5}, intermediate_size=24, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False
    )
    card, shape = find_device("rtx3090"), Shape(2, 10)
    whole, stretched = (OfflineModel(config, shape, torch.bfloat16, card, whole=w, precision=precision) for w in (True, False))
    for budget in (10_000, 10**6, 10**9):
        assert stretched.problem(budget, "adamw", Choices()) == whole.problem(budget, "adamw", Choices())


def test_the_smallest_budget_holds_and_one_byte_less_does_not() -> None:
    model = OfflineModel(LLAMA, Shape(1, 8), torch.float32, find_device("rtx4090"))
    nbytes, binding = smallest_offline(model, "adamw", Choices())
    assert plan(model.problem(nbytes, "adamw", Choices()), time_limit_s=1.0).peak_nbytes <= nbytes
    assert binding
    with pytest.raises(BudgetError):
        plan(model.problem(nbytes - 1, "adamw", Choices()), time_limit_s=1.0)


def test_weights_take_no_memory_and_count_in_blocks() -> None:
    model, _ = build_fake(LLAMA, torch.bfloat16, block_nbytes=512)
    assert {type(parameter.data).__name__ for parameter in model.parameters()} == {"FakeTensor"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    card = OfflineModel(LLAMA, Shape(1, 8), torch.bfloat16, find_device("rtx4090"))
    problem = card.problem(BUDGET, "adamw", Choices())
    sizes = [chunk.grad_nbytes for chunk in problem.chunks] + [chunk.state_nbytes for chunk in problem.chunks]
    assert all(nbytes % 512 == 0 for nbytes in sizes)
    assert card.weights_nbytes % 512 == 0
    assert torch.get_default_dtype() is torch.float32


def test_an_offline_problem_can_be_planned() -> None:
    card = OfflineModel(LLAMA, Shape(1, 8), torch.float32, find_device("h100"))
    problem = card.problem(BUDGET, "adamw", Choices(host_nbytes=10**9))
    assert [link.placement for link in problem.links] == [Placement.HOST, Placement.DISK]
    assert problem.links[0].capacity_nbytes == 10**9
    assert not any(link.overlaps for link in problem.links)  # unless they are counted on
    overlapping = card.problem(BUDGET, "adamw", Choices(overlap=True))
    assert [link.overlaps for link in overlapping.links] == [True, False]
    schedule = plan(problem, time_limit_s=2.0, seed=0)
    assert schedule.peak_nbytes <= BUDGET
    assert schedule.sweep_us > 0


@pytest.mark.slow
def test_a_kept_plan_names_the_graph_of_the_real_model() -> None:
    config = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 5}, intermediate_size=24, max_position_embeddings=32, use_cache=False)
    model = OfflineModel(config, Shape(1, 8), torch.float32, find_device("cpu"))
    problem = model.problem(10**9, "adamw", Choices())
    made_for = model.kept(problem, plan(problem, time_limit_s=1.0), "adamw").fingerprint
    real = chunkft_compile.compile(transformers.AutoModelForCausalLM.from_config(config), budget=10**9)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    real.plan(input_ids=ids, labels=ids)
    compiled = real._session.latest
    assert compiled is not None
    here = fingerprint(compiled, accumulating=False)
    assert replace(made_for, optimizer=here.optimizer, inputs=here.inputs) == here  # from five layers and from three


def test_choices_reach_the_problem_and_impossible_ones_are_refused() -> None:
    model = OfflineModel(LLAMA, Shape(1, 8), torch.float32, find_device("cpu"))
    choices = Choices((Update.HELD, Update.IMMEDIATE), weights=(Placement.DEVICE, Placement.DISK))
    problem = model.problem(BUDGET, "sgd", choices)
    assert (problem.updates, problem.weights, problem.state) == (choices.updates, choices.weights, tuple(Placement))
    forced = model.problem(BUDGET, "sgd", Choices(state=(Placement.DISK,), options=("inputs",)))
    assert forced.state == (Placement.DISK,)
    assert {cost.option for cost in forced.kinds[1].active} == {"inputs"}
    with pytest.raises(ValueError, match="no segment has an option 'magic'; there are cheap, inputs"):
        model.problem(BUDGET, "sgd", Choices(options=("magic",)))
    with pytest.raises(ValueError, match="cpu has no host beside it for weights: device, disk"):
        model.problem(BUDGET, "sgd", Choices(weights=(Placement.DEVICE, Placement.HOST)))
    with pytest.raises(ValueError, match="33 tokens are longer than the 32 positions of llama"):
        OfflineModel(LLAMA, Shape(1, 33), torch.float32, find_device("cpu"))


def test_a_config_of_a_directory_or_a_file(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        config = read_config(str(source))
        assert (config.model_type, config.hidden_size, config.tie_word_embeddings, config.use_cache) == ("llama", 16, True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config.json; presets: llama-2-7b, llama-3-8b"),
        ("{", "cannot be read as JSON"),
        ("[]", "it has no `model_type`"),
        ('{"model_type": "zebra"}', "is not valid: .*zebra"),
        ('{"model_type": "vit"}', "which is not a causal language model"),
    ],
)
def test_bad_configs_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nothing_is_refused_with_the_presets() -> None:
    with pytest.raises(ValueError, match=r"'llama-9' is neither a preset nor a file; presets: llama-2-7b.*nothing is downloaded"):
        read_config("llama-9")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    model, _ = build_fake(read_config(name), torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PRESETS[name].parameters
    config = read_config(name)
    assert json.loads(config.to_json_string())["model_type"] == PRESETS[name].model_type
