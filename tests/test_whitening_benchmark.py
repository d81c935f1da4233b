"""The whitening benchmark: real gradients, the paper's iteration, and the table on its page."""

import json
import statistics

import pytest
import reference
import torch
import whitening as benchmark
import whitening_cost as cost
from conftest import dense, relative_error
from documents import ROOT, page_with, section
from quality_report import of_study


RESULTS = ROOT / "recipes" / "benchmarks" / "results" / "whitening-cpu.json"


@pytest.fixture(scope="module")
def trained():
    """Row-standardised gradients of a small LLaMA after some training, and the paper's polynomial of each."""
    return [(grad, benchmark.paper_polynomial(grad.double())) for grad in benchmark.gradients(128, 344, steps=10)]


def cosine(a, b):
    return torch.cosine_similarity(a.double().flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("shape", [(24, 24), (24, 64), (64, 24)])
def test_the_baseline_is_the_papers_iteration(shape):
    grad = dense(*shape)
    assert relative_error(benchmark.paper_polynomial(grad.double()), reference.newton_schulz(grad)) <= 1e-9


def test_muon_is_five_quintic_steps_in_bf16():
    grad = dense(2, 24, 64)
    x = grad.double() / torch.linalg.matrix_norm(grad.double(), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    assert cosine(benchmark.muon(grad), x) >= 0.999


def test_gradients_of_training_are_as_badly_conditioned_as_the_fidelity_needs(trained):
    for grad, _ in trained:
        values = torch.linalg.svdvals(grad.double())
        assert values[len(values) // 2] <= 0.1 * values[0]


def test_newton_schulz_is_the_papers_polynomial_on_gradients_of_training(trained):
    assert len(trained) == 7
    for grad, exact in trained:
        assert relative_error(benchmark.newton_schulz(grad), exact) <= 1e-4


def test_float16_products_have_a_cosine_of_0_999_on_gradients_of_training(trained):
    for grad, exact in trained:
        assert cosine(benchmark.newton_schulz(grad, ns_dtype="float16"), exact) >= 0.999


def test_the_table_on_the_page_is_the_results():
    results = json.loads(RESULTS.read_text())
    assert page_with(benchmark.table(results["records"]))
    assert results["setup"]["threads"] == 1


@pytest.mark.parametrize("model", ["60m", "130m"])
def test_polar_express_of_a_layer_on_a_cpu_takes_at_most_what_muon_takes_in_the_results(model):
    five_steps, one_step = layer_to_muon(RESULTS.name, model)
    assert five_steps <= 1
    assert one_step <= 0.25


def layer_to_muon(results, model):
    """What the matrices of a layer take with five steps in bfloat16 and with one, to torch's Muon."""
    hidden, intermediate = benchmark.MODELS[model]
    records = {(*r["shape"], r["method"]): r for r in json.loads((RESULTS.parent / results).read_text())["records"]}

    def layer(method):
        square, wide = ((hidden, n, method) for n in (hidden, intermediate))
        return 4 * records[square]["milliseconds"] + 3 * records[wide]["milliseconds"]

    muon = layer("`torch.optim.Muon`, bf16")
    return layer("`polar_express`, `ns_dtype=bfloat16`") / muon, layer(benchmark.ONE_STEP) / muon


@pytest.mark.parametrize("model", ["60m", "130m"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_swan_on_a_cpu_takes_at_most_what_one_of_muon_takes_in_the_results(model, dtype):
    records = json.loads((RESULTS.parent / "step-time-whitening-cpu.json").read_text())["records"]
    ratios = {r["optimizer"]: r["ratio"] for r in records if (r["model"], r["dtype"]) == (model, dtype)}
    assert ratios["swan"] <= ratios["Muon (torch)"]
    assert ratios["sinkgd_polar"] <= 0.4 * ratios["Muon (torch)"]


def test_what_the_page_tells_of_cpus_with_amx_is_the_results():
    told = {"swan": [], "sinkgd_polar": []}
    for name in ("", "-2-threads"):
        records = json.loads((RESULTS.parent / f"step-time-whitening-amx{name}-cpu.json").read_text())["records"]
        of_muon = {(r["model"], r["dtype"]): r["ratio"] for r in records if r["optimizer"] == "Muon (torch)"}
        for r in records:
            if r["optimizer"] in told:
                told[r["optimizer"]].append(r["ratio"] / of_muon[r["model"], r["dtype"]])
    assert {name: len(ratios) for name, ratios in told.items()} == {"swan": 8, "sinkgd_polar": 8}
    swan, polar = (f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in told.values())
    assert page_with(f"{swan} and {polar} times Muon's")
    layers = [layer_to_muon("whitening-amx-cpu.json", model) for model in ("60m", "130m")]
    (first, one), (second, other) = layers
    assert page_with(f"takes {first:.2f}x and {second:.2f}x, one step of it {one:.2f}x and {other:.2f}x")


def test_the_table_of_rounding_on_the_page_is_the_results():
    records = json.loads((RESULTS.parent / "whitening-rounding-cpu.json").read_text())["records"]
    assert page_with(benchmark.rounding_table(records))
    assert {tuple(r["shape"]) for r in records} >= {(512, 512), (512, 1376), (2048, 2048), (2048, 5461)}


def test_the_losses_on_the_page_are_means_over_three_seeds():
    records = json.loads((RESULTS.parent / "quality-cpu.json").read_text())["records"]
    lines = section("hf_stateless/norms/README.md", "Whitenings").splitlines()
    rows = {"`polar_express`": "swan", "`polar_express`, `ns_dtype=bfloat16`": "swan, bfloat16"}
    means = []
    for name, row in {**rows, "`newton_schulz`": "swan, newton_schulz"}.items():
        cells = []
        for study in ("small", "long"):
            runs = [r for r in of_study(records, study) if r["row"] == f"{row}, rest 32/4/16x"]
            losses = {r["seed"]: r["eval_loss"] for r in runs if r["learning_rate"] == 4e-3}
            assert set(losses) == {0, 1, 2}
            cells.append(statistics.mean(losses.values()))
        assert f"| {name} | {cells[0]:.3f} | {cells[1]:.3f} |" in lines
        means.append(cells)
    for losses in zip(*means, strict=True):
        assert max(losses) - min(losses) <= 0.0055, "the page says: within 0.005"


def test_the_table_of_counted_costs_on_the_page_is_what_is_counted():
    records = json.loads((RESULTS.parent / "whitening-cost.json").read_text())["records"]
    assert page_with(cost.table(records))
    assert cost.table(cost.measure("1b")) in cost.table(records)


@pytest.mark.parametrize("row", ["`swan`", "`swan`, `ns_dtype=float32`"])
def test_swan_has_as_many_products_as_muon(row):
    """On an accelerator: fifteen, and those of Muon's sizes."""
    counted = {name: cost.count(cost.ROWS[name], [(96, 256), (256, 96)]) for name in (row, cost.MUON)}
    assert counted[row].products == counted[cost.MUON].products == 30
    assert sum(counted[row].flops.values()) == sum(counted[cost.MUON].flops.values())


def test_products_are_counted_by_their_dtype():
    small, large = (cost.count(cost.ROWS["`swan`"], [shape]).flops for shape in ((96, 300), (300, 96 * 3)))
    assert set(small) == {torch.float32}
    assert set(large) == {torch.bfloat16}
    assert cost.count(lambda grad: grad @ grad.mT, [(8, 4)]).flops == {torch.bfloat16: 2 * 8 * 8 * 4}
