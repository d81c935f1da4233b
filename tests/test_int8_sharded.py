"""8-bit weights under FSDP2: several gloo processes against one."""

from functools import partial

import pytest
import torch
from int8_held_ranks import CASES as HELD
from int8_held_ranks import RELEASED, REPLICATED, gathered_bytes
from int8_held_ranks import alone as held_alone
from int8_held_ranks import part_bytes as held_bytes
from int8_ranks import CASES, SHAPES, alone, killed, resumed, worker
from rank_processes import on_ranks


WORLDS = (2, 4)
CHECKPOINTS = [(2, 2), (2, 4), (4, 4)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank of two and of four processes got; four go on from the checkpoints of two."""
    shared = str(tmp_path_factory.mktemp("shared"))
    return {world: on_ranks(partial(worker, world, shared), world) for world in WORLDS}


def assert_bytes(results, case, expected):
    for of_rank in results:
        assert of_rank[case].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(of_rank[case][name], tensor), name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_sharded_steps_write_the_bytes_of_one_process(case, world, ranks):
    assert_bytes(ranks[world], case, alone(case, world))


def test_a_hybrid_mesh_writes_the_bytes_of_one_process(ranks):
    assert_bytes(ranks[4], "hybrid", alone("swan", 4))


@pytest.mark.parametrize(("before", "world"), CHECKPOINTS)
@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_a_checkpoint_is_gone_on_from_to_the_same_bytes(kind, before, world, ranks):
    """On another number of ranks too: the average of exact gradients is the same for all of them but for a factor."""
    assert_bytes(ranks[world], f"{kind} of {before}", alone("swan", world))


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_keeps_its_codes_and_scales_and_nothing_of_the_others(world, ranks):
    for of_rank in ranks[world]:
        assert of_rank["memory"] == {"kept": part_bytes(world), "alive": 0}


@pytest.mark.parametrize("world", WORLDS)
def test_weights_travel_in_8_bits(world, ranks):
    """Codes and scales in place of bf16, twice but for the layer that the root keeps; gradients as ever."""
    kept = [list(SHAPES)[-1]]
    for of_rank in ranks[world]:
        sent = of_rank["traffic"]
        assert sent["int8"]["gathered"] == 2 * part_bytes(world) - part_bytes(world, kept)
        assert sent["bf16"]["gathered"] == 4 * part_bytes(world, scale=0) - 2 * part_bytes(world, kept, scale=0)
        assert sent["int8"]["reduced"] == sent["bf16"]["reduced"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [*HELD, *RELEASED, *(f"DDP {case}" for case in REPLICATED)])
def test_stacks_and_tables_get_the_bytes_of_one_process(case, world, ranks):
    expected = held_alone(case.removeprefix("DDP "), world)
    for of_rank in ranks[world]:
        state = of_rank["held"][case]
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            if not (case.startswith("bfloat16") and name.endswith("bias")):  # rounded by noise of each shard
                assert torch.equal(state[name], tensor), name
    first, *others = (of_rank["held"][case] for of_rank in ranks[world])
    assert_bytes([{case: other} for other in others], case, first)


@pytest.mark.parametrize(("before", "world"), CHECKPOINTS)
def test_a_checkpoint_of_stacks_and_tables_is_gone_on_from_to_the_same_bytes(before, world, ranks):
    expected = held_alone("swan, factored", world, before)
    for kind in ("FULL", "SHARDED", "FULL on the device")[: 2 + (before == world)]:
        assert_bytes([of_rank["held"] for of_rank in ranks[world]], f"{kind} of {before}", expected)


@pytest.mark.parametrize("world", WORLDS)
def test_stacks_and_tables_are_kept_in_parts_and_travel_in_8_bits(world, ranks):
    for of_rank in ranks[world]:
        assert of_rank["held"]["kept"] == held_bytes(world)
        assert of_rank["held"]["gathered"] == gathered_bytes(world)


def part_bytes(world, names=SHAPES, scale=2):
    """Count the bytes of a rank's part in 8 bits: parts are as long as the longest, and a group has a scale."""
    shapes = [SHAPES[name] for name in names]
    return sum(
        -(-rows // world) * (columns + columns // (group or columns) * scale) for rows, columns, group in shapes
    )


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("columns", "ValueError: An 8-bit weight (37, 64) can be cut between rows only"),
        (
            "stack",
            "ValueError: An 8-bit weight (4, 6, 8) can be cut between the matrices of a stack only, got parts (4, 3,",
        ),
        ("float16", "RuntimeError: FSDP2 casts scales of 8-bit weights to float16: type mixed_precision: bf16 or no."),
        (
            "float16 stack",
            "RuntimeError: FSDP2 casts scales of 8-bit weights to float16: type mixed_precision: bf16 or no.",
        ),
        ("not gathered", "RuntimeError: The weight of an 8-bit layer has become a DTensor: call the module that"),
        ("read as floats", "NotImplementedError: aten.sum.default: not for an 8-bit weight that is cut over ranks."),
        ("written as floats", "NotImplementedError: copy_ of float values: not for an 8-bit weight that is cut"),
        (
            "float copy",
            "ValueError: The weights are cut over ranks: save the model, and load the folder in one process",
        ),
        ("whole state", "got whole weights for a model that is cut over ranks: load them by set_model_state_dict(..."),
        ("damaged", "the codes do not fit their scales, so the file is damaged"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(case, message, ranks):
    for of_rank in ranks[2]:
        assert message in of_rank["refusals"][case]


@pytest.mark.parametrize("moment", ["step", "checkpoint"])
def test_after_a_killed_rank_the_checkpoint_before_is_gone_on_from_to_the_same_bytes(moment, tmp_path):
    ends = torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException
    with pytest.raises(ends, match=r"SIGKILL|Connection"):
        on_ranks(partial(killed, 2, moment, str(tmp_path)), 2)
    assert (tmp_path / "killed" / ".metadata").is_file()  # what torch writes last
    half_written = tmp_path / "half written"
    assert half_written.is_dir() == (moment == "checkpoint")
    assert not (half_written / ".metadata").exists()
    expected = alone("swan", 2)
    for state in on_ranks(partial(resumed, 2, str(tmp_path)), 2):
        assert_bytes([{"resumed": state}], "resumed", expected)
