"""What `hf-stateless memory --tp N --ep N` predicts, against models that transformers has cut over gloo processes."""

import json

import pytest
import torch
from memory_models import meta_model
from parallel_models import NEWER, RATES, backward, load, save_models
from rank_processes import announce_rank, joined, on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stateless import create_optimizer
from hf_stateless.reports.predicted import Settings, build_model, estimate
from hf_stateless.reports.predicted.command import main
from hf_stateless.reports.predicted.model import load_config
from hf_stateless.reports.predicted.parallel_wire import sent_by_optimizer, sent_by_plans


BATCH, SEQ = 4, 8
CASES = {
    "llama, tp": ("llama", {"tp_plan": "auto"}, {"tp": 2}),
    "experts, tp": ("qwen3_moe", {"tp_plan": "auto"}, {"tp": 2}),
    "experts, ep": ("qwen3_moe", {"tp_size": 2, "ep_size": 2}, {"tp": 2, "ep": 2}),
    "experts with biases, ep": ("gpt_oss", {"tp_size": 2, "ep_size": 2}, {"tp": 2, "ep": 2}),
    "experts, ep and fsdp": ("qwen3_moe", {"fsdp_size": 2, "ep_size": 2}, {"fsdp": 2, "ep": 2}),
}
NAMES = ("sinkgd", "swan")
# What a ring of two sends of what an operation is given.
SENT = {"all_reduce": 1, "allreduce_": 1, "all_gather_into_tensor": 1, "all_to_all_single": 0.5, "alltoall_base_": 0.5}


class Wire(TorchDispatchMode):
    """Counts the bytes that a rank of two sends, those of FSDP2 and of counts of tokens aside."""

    sent = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[-2] if "c10d" in str(function) else ""
        if name in SENT:
            given = [
                t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, torch.Tensor)
            ]
            last = given[-1] if name == "alltoall_base_" else given[0]
            self.sent += SENT[name] * last.nbytes * last.is_floating_point()
        return function(*args, **(kwargs or {}))


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measured(models, case, rank):
    kind, plan, _ = CASES[case]
    model = load(models, kind, plan)
    found = {"shapes": {name: tuple(local(p).shape) for name, p in model.named_parameters()}, "kept": {}, "step": {}}
    with Wire() as wire:
        backward(model, 0)
    found["sent"] = wire.sent
    for name in NAMES:
        optimizer = create_optimizer(model, name, **RATES)
        with Wire() as wire:
            optimizer.step()
        found["step"][name] = wire.sent
        found["kept"][name] = sum(local(t).nbytes for state in optimizer.state.values() for t in state.values())
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    announce_rank(rank, 2)
    models = f"{folder}/models-{rank}"
    save_models(models)
    with joined(rank, folder, 2) as save:
        save({case: measured(models, case, rank) for case in CASES})


@pytest.fixture(scope="module")
def two():
    return on_ranks(worker, 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def predicted(models, case, **more):
    kind, _, cut = CASES[case]
    settings = Settings(dtype="fp32", batch=BATCH, seq=SEQ, **cut, **more)
    return build_model(load_config(f"{models}/{kind}"), settings), settings


needs_newer = pytest.mark.skipif(not NEWER, reason="this transformers cuts by tensor parallelism alone")


@needs_newer
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_holds_what_is_predicted_and_sends_it(case, two, models):
    model, settings = predicted(models, case)
    rows = estimate(model, NAMES, settings)
    fullest = two[0][case]  # the first rank has the largest part of what is cut unevenly
    if settings.fsdp == 1:
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == fullest["shapes"]
    weights = 4 * sum(torch.Size(shape).numel() for shape in fullest["shapes"].values())
    assert rows[0].weights == pytest.approx(weights, rel=0.02)
    for row in rows:
        assert row.optimizer_state == fullest["kept"][row.optimizer]
    sent = [sum(rank[case]["sent"] for rank in two) / 2, sent_by_plans(model, settings)]
    assert sent[1] == pytest.approx(sent[0], rel=0.05)
    for name in NAMES:
        found = max(rank[case]["step"][name] for rank in two)
        assert sent_by_optimizer(model, name, {}, settings) == pytest.approx(found, rel=0.05, abs=200)


@pytest.fixture
def told(models, capsys):
    """What the command prints of a model, and its exit status."""

    def ask(kind, words):
        status = main([f"{models}/{kind}", "--seq", "8", *words.split()])
        return status, *capsys.readouterr()

    return ask


@pytest.mark.parametrize(
    ("kind", "words", "line"),
    [
        ("llama", "--tp 8", "--tp 8: num_attention_heads is 4, expected a multiple of 8: type another, or --fsdp."),
        ("qwen3_moe", "--tp 4", "--tp 4: num_key_value_heads is 2, expected a multiple of 4"),
        (
            "llama",
            "--fsdp 2 --ep 2",
            "no plan for experts: leave out" if NEWER else "type pip install -U 'transformers",
        ),
        ("gpt2", "--tp 2", "GPT2LMHeadModel has no plan for tensor parallelism: type --fsdp 2."),
        (
            "qwen3_moe",
            "--ep 2",
            "--ep 2: expected a multiple of --tp (1) that divides --fsdp x --tp (1): type --fsdp 2",
        ),
        pytest.param("qwen3_moe", "--fsdp 8 --ep 8", "4 experts, expected a multiple of 8.", marks=needs_newer),
        ("qwen3_moe", "--tp 2 --fsdp 3 --ep 3", "--ep 3: expected a multiple of --tp (2)"),
        ("llama", "--tp 2 --zero 2 --ranks 2", "--tp 2: got --zero beside it, expected one of the two."),
        (
            "llama",
            "--tp 2 --dtype int8",
            "a GPU would have 16 of 32 columns, expected a multiple of the 32 weights that share a scale",
        ),
        ("llama", "--tp 2 --lora 8", "--tp 2: got --lora beside it, expected one of the two."),
        (
            "llama",
            "--tp 2 --optim adafactor",
            "--tp 2: expected adamw_torch, adamw_torch_fused or an optimizer of ours",
        ),
        ("qwen3_moe", "--fsdp 2 --ep 2 --optim adamw_bnb_8bit", "--ep 2: expected adamw_torch, adamw_torch_fused or"),
        ("llama", "--tp 0", "expected an integer of at least 1, got '0'"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(kind, words, line, told, models):
    if kind == "gpt2":
        (models / kind).mkdir(exist_ok=True)
        config = meta_model("gpt2", Settings(batch=1, seq=8)).config
        (models / kind / "config.json").write_text(config.to_json_string())
    status, out, err = told(kind, words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert line in err


@needs_newer
def test_the_command_tells_how_a_model_is_cut_and_counts_it_as_a_whole(told):
    status, text, _ = told("qwen3_moe", "--tp 2 --fsdp 2 --ep 4 --optim sinkgd,adamw_torch_fused")
    assert status == 0
    ways = "FSDP2 over 2 GPUs and tensor parallelism over 2 GPUs and expert parallelism over 4 GPUs"
    assert f"{ways}, figures for one of them" in text
    assert "of activations by the plans; by the optimizers: sinkgd " in text
    whole, cut = (json.loads(told("qwen3_moe", f"{words} --json")[1]) for words in ("", "--tp 2 --fsdp 2 --ep 4"))
    assert whole["parameters"] == cut["parameters"] == cut["trained_parameters"]
    of_whole = {row["optimizer"]: row for row in whole["estimates"]}
    assert {*of_whole} - {row["optimizer"] for row in cut["estimates"]} == {"adamw_bnb_8bit"}
    for alone, part in ((of_whole[row["optimizer"]], row) for row in cut["estimates"]):
        assert part["weights"] < 0.35 * alone["weights"]
        assert part["peak"] < alone["peak"]
        assert (alone["sent_by_plans"], part["sent_by_plans"] > 0) == (0, True)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_checkpointing_sends_the_sums_of_the_layers_once_more(kind, models):
    settings = [Settings(dtype="fp32", batch=1, seq=8, tp=2, checkpointing=again) for again in (False, True)]
    plain, again = (sent_by_plans(build_model(load_config(f"{models}/{kind}"), s), s) for s in settings)
    outputs = 2  # of attention and of the layer's second half
    assert again - plain == 2 * outputs * 8 * 32 * 4


@needs_newer
def test_experts_that_have_one_gpu_are_not_gathered(models):
    config, one = load_config(f"{models}/qwen3_moe"), {"dtype": "fp32", "batch": 1, "seq": 8}
    settings = [Settings(**one, fsdp=4, ep=ep) for ep in (1, 2, 4)]
    rows = [estimate(build_model(config, s), ["sinkgd"], s)[0] for s in settings]
    assert rows[0].weights == rows[1].weights == rows[2].weights
    assert rows[0].gathered > rows[1].gathered > rows[2].gathered
    assert rows[0].sent_by_fsdp > rows[1].sent_by_fsdp > rows[2].sent_by_fsdp
