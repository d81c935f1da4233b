"""8-bit weights that transformers cuts by tensor and expert parallelism: several gloo processes against one."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from int8_parallel_ranks import (
    GIVEN,
    GROUP,
    NEWER,
    ON_FOUR,
    PREDICTED,
    PREDICTED_PLANS,
    SAVED,
    TOKENS,
    TRAINED,
    go_on_alone,
    in_8_bits,
    known,
    run_absent,
    run_given,
    run_trained,
    run_trainer,
    save_alone,
    save_models,
    worker,
)
from rank_processes import on_ranks

from hf_stateless.reports.predicted import Settings, build_model, estimate
from hf_stateless.reports.predicted.model import load_config
from hf_stateless.weights.int8.convert import int8_weights
from hf_stateless.weights.int8.parallel import check_plan
from hf_stateless.weights.int8.weight import Int8Weight


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

WORLDS = (2, 4)
STEPPED = [(case, world) for case in known(GIVEN) for world in WORLDS if world == 2 or case in ON_FOUR]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, and what one process has saved of them."""
    made = save_models(tmp_path_factory.mktemp("models"))
    save_alone(made)
    return made


@pytest.fixture(scope="module")
def ranks(folder):
    """What each rank of two and of four processes got; four go on from a checkpoint of two."""
    return {world: on_ranks(partial(worker, world, str(folder)), world) for world in WORLDS}


@pytest.fixture(scope="module")
def alone(folder):
    """The models that one process has trained on given gradients."""
    return {case: run_given(folder, case) for case in known(GIVEN)}


def assert_bytes(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_close(actual, expected, codes):
    """Floats differ by rounding, and so few codes by one."""
    assert actual.keys() == expected.keys()
    differ = 0
    for name, tensor in expected.items():
        if tensor.dtype == torch.int8:
            apart = (actual[name].int() - tensor.int()).abs()
            assert apart.max() <= 1, name
            differ += int(apart.sum())
        else:
            torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert differ <= codes


@pytest.mark.parametrize(("case", "world"), STEPPED)
def test_steps_on_the_same_gradients_write_the_bytes_of_one_process(case, world, ranks, alone, folder):
    expected = alone[case].state_dict()
    start = in_8_bits(folder, GIVEN[case][0], embeddings="embeddings" in GIVEN[case][3]).state_dict()
    moved = {name for name, t in expected.items() if t.dtype == torch.int8 and not torch.equal(t, start[name])}
    assert moved == {name for name, t in expected.items() if t.dtype == torch.int8}
    for of_rank in ranks[world]:
        assert_bytes(of_rank["given"][case], expected)


@pytest.mark.parametrize(("case", "world"), STEPPED)
def test_a_model_in_parts_saves_the_folder_of_one_process(case, world, ranks, alone, folder, tmp_path):
    assert ranks
    alone[case].save_pretrained(tmp_path)
    assert_same_files(folder / f"{case} on {world}", tmp_path)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", SAVED)
def test_a_folder_of_one_process_is_loaded_in_parts_and_gone_on_with(kind, world, ranks, folder):
    expected = go_on_alone(folder, kind)
    for of_rank in ranks[world]:
        assert_bytes(of_rank["loaded"][kind], expected)
    assert_same_files(folder / f"{kind} saved again on {world}", folder / f"{kind} saved")


def assert_same_files(folder, expected):
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("case", known(TRAINED))
def test_a_model_in_parts_trains_as_on_one_process(case, ranks, folder):
    """Sums of activations are in another order, so that some updates lie on the other side of a rounding."""
    expected = run_trained(folder, case).state_dict()
    for of_rank in ranks[2]:
        assert_close(of_rank["trained"][case], expected, codes=8)
    assert_bytes(ranks[2][1]["trained"][case], ranks[2][0]["trained"][case])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["SHARDED", "FULL of 2"])
def test_a_checkpoint_is_gone_on_from_to_the_same_bytes(kind, world, ranks, alone):
    for of_rank in ranks[world]:
        assert_bytes(of_rank["resumed"][kind], alone["llama, tp, tables"].state_dict())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_rank_keeps_its_part_of_codes_and_scales(kind, world, ranks, folder):
    model = in_8_bits(folder, kind, embeddings=True)
    tokens = {"lm_head": -(-TOKENS // world), "embed_tokens": -(-TOKENS // world) if NEWER else TOKENS}
    shapes = {name: p.shape for name, p in int8_weights(model)}
    weights = sum(tokens.get(name.split(".")[-2], s[0] / world) * s[1:].numel() for name, s in shapes.items())
    assert ranks[world][0]["kept"][kind] == weights + 2 * weights // GROUP


def test_the_optimizer_sends_what_it_sends_for_float_weights(ranks):
    for of_rank in ranks[2]:
        assert of_rank["sent"]["int8"] == of_rank["sent"]["float"]


@pytest.mark.parametrize("kind", PREDICTED)
def test_a_rank_holds_what_is_predicted(kind, ranks, folder):
    plan = PREDICTED_PLANS[kind]
    settings = Settings(dtype="int8", tp=2, ep=plan.get("ep_size", 1), batch=4, seq=8)
    model = build_model(load_config(f"{folder}/predicted {kind}"), settings)
    held = ranks[2][0]["shapes"][kind]
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == held
    itemsize = {name: 1 if isinstance(p, Int8Weight) else p.itemsize for name, p in model.named_parameters()}
    expected = sum(itemsize[name] * torch.Size(shape).numel() for name, shape in held.items())
    (row,) = estimate(model, ["sinkgd"], settings)
    assert row.weights == pytest.approx(expected, rel=0.02)


def test_what_has_no_gradient_on_a_rank_steps_as_if_it_were_zero_there(ranks, folder):
    for of_rank in ranks[2]:
        assert_bytes(of_rank["absent"], run_absent(folder).state_dict())


def test_the_trainer_clips_logs_and_saves_as_on_one_process(ranks, folder):
    expected = run_trainer(folder)
    for of_rank in ranks[2]:
        assert_close(of_rank["trainer"], expected, codes=8)
    if NEWER:
        files = [
            sorted(file.name for file in (folder / f"by the trainer{parts}").iterdir()) for parts in ("", " in parts")
        ]
        assert files[0] == files[1]


def test_expert_parallelism_of_older_versions_is_refused():
    config = SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2, enable_expert_parallel=True))
    with pytest.raises(ValueError, match="ep_size in place of enable_expert_parallel"):
        check_plan(SimpleNamespace(config=config))


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (
            "groups",
            "down_proj: 2 ranks would have 32 of the 64 columns each, and 64 weights share a scale: "
            "type Int8TrainingConfig(group_size=32), or take another number of ranks.",
        ),
        ("rows", "and 64 weights share a scale: type Int8TrainingConfig(group_size=32), or take another number of"),
        (
            "stored groups",
            "share a scale: load it on another number of ranks, or hf-stateless export it and",
        ),
        (
            "packed columns",
            "gate_up_proj: 2 matrices lie side by side in it, and each is cut: add its module to",
        ),
        (
            "fsdp",
            "got DistributedConfig(fsdp_size=2) for weights in 8 bits, which transformers can cut by",
        ),
        (
            "floats",
            "The weights are cut over ranks: save the model, and load the folder in one process to",
        ),
        ("int8 momentum", "momentum_dtype=int8 has scales for whole groups of a row, but rows are cut over ranks"),
        (
            "feedback",
            "rounding_feedback=true needs whole rows on each rank: load the model without tensor",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(case, line, ranks):
    for of_rank in ranks[2]:
        assert of_rank["refused"][case].startswith("ValueError: ")
        assert line in of_rank["refused"][case]
        assert "\n" not in of_rank["refused"][case]
