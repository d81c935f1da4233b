"""The C kernel of SinkGD on CPU: the same as the torch twin and as float64, at work by itself, and done without."""

import logging
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import dense, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import multinorm_update_

from hf_stateless import StatelessOptimizer
from hf_stateless.norms.sinkhorn import sinkhorn_scalings
from hf_stateless.update.kernels import cpu_compiler, cpu_sinkgd
from hf_stateless.update.layout import LAYOUTS
from hf_stateless.weights.noise import rounding_key


pytestmark = pytest.mark.skipif(not cpu_compiler.compiler(), reason="needs a C compiler")

RULE = {"lr": 0.01, "lr_scale": 0.4, "weight_decay": 0.1, "layout": "out_in", "norms": ("row_l2", "col_l2")}
SHAPES = [(256, 256), (48, 1376), (1376, 49), (13, 5461), (5461, 13), (1, 70000), (70000, 1), (1003, 67)]


@pytest.fixture(autouse=True)
def one_size(monkeypatch):
    """Small matrices take the kernel too, and one matrix whatever the number of threads."""
    monkeypatch.delenv("HF_STATELESS_KERNELS", raising=False)
    monkeypatch.setattr(cpu_sinkgd, "_SMALLEST", 1)
    monkeypatch.setattr(cpu_sinkgd, "_WORTH_THREADS", 1 << 20)


@pytest.fixture
def updated_by_c(monkeypatch):
    """For each call of the kernel, which weights it updated."""
    results, steps = [], cpu_sinkgd.sinkgd_steps_

    def recorded(*args, **options):
        results.append(steps(*args, **options))
        return list(results[-1])

    monkeypatch.setattr("hf_stateless.update.kernels.cpu_sinkgd.sinkgd_steps_", recorded)
    return results


def update(weights, grads, keys=None, **options):
    results = [weight.clone() for weight in weights]
    return results, multinorm_update_(results, grads, keys, **{**RULE, "num_iterations": 5, **options})


def twin(monkeypatch, weights, grads, keys=None, **options):
    with monkeypatch.context() as patch:
        patch.setenv("HF_STATELESS_KERNELS", "torch")
        pairs = [
            update([w], [g], keys and [keys[i]], **options)
            for i, (w, g) in enumerate(zip(weights, grads, strict=True))
        ]
    return [weight for (weight,), _ in pairs], [finite for _, (finite,) in pairs]


def exact(weight, grad, iterations=5):
    row, column = sinkhorn_scalings(grad.double(), iterations)
    return weight.double() * (1 - 0.01 * 0.1) - 0.01 * 0.4 * row.unsqueeze(1) * grad.double() * column


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_weights_are_those_of_float64_to_1e_6(shape, grad_dtype, iterations, updated_by_c):
    grad = dense(*shape, dtype=grad_dtype, scale=1e-5)
    (result,), finite = update([torch.zeros(shape)], [grad], num_iterations=iterations, weight_decay=0.0)
    assert finite == [True]
    assert updated_by_c == [[True]]
    assert relative_error(result, exact(torch.zeros(shape), grad, iterations)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "live"), [((64, 4096), 1), ((8, 40000), 1), ((2, 40000), 4), ((1, 70000), 1)])
@pytest.mark.parametrize("scale", [1e-31, 1e-30, 3e-30, 1e-29, 1e-28])
def test_tiny_gradients_with_few_live_columns_keep_the_weight_finite(scale, shape, live, dtype):
    grad = torch.zeros(shape, dtype=dtype)
    grad[:, :live] = scale
    (result,), _ = update([torch.zeros(shape, dtype=dtype)], [grad], weight_decay=0.0)
    assert bool(result.isfinite().all())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_weights_are_the_nearest_to_float64(shape, grad_dtype, updated_by_c):
    weight, grad = dense(*shape, dtype=torch.bfloat16), dense(*shape, dtype=grad_dtype, seed=1)
    (result,), _ = update([weight], [grad])
    assert updated_by_c == [[True]]
    assert (result != exact(weight, grad).to(torch.bfloat16)).float().mean() < 1e-4
    assert not torch.equal(result, weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rounding_noise_is_that_of_the_twin(shape, monkeypatch):
    weight, grad = dense(*shape, dtype=torch.bfloat16), dense(*shape, dtype=torch.bfloat16, seed=1)
    keys = [rounding_key(3, 1, torch.ones(1))]
    (result,), _ = update([weight], [grad], keys)
    ((expected,), _), ((nearest,), _) = twin(monkeypatch, [weight], [grad], keys), update([weight], [grad])
    assert (result != expected).float().mean() < 1e-4
    assert (result != nearest).float().mean() > 0.01


def test_rounding_is_unbiased():
    weight, grad = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64)
    step, count = 1e-4, 400
    results = [update([weight], [grad], [rounding_key(0, 0, torch.full((1,), float(i)))], lr=step / 0.4)[0][0]
               for i in range(count)]  # fmt: skip
    mean = torch.stack(results).double().mean()
    expected = 1 - step / 0.4 * 0.1 - step
    assert {*torch.stack(results).flatten().tolist()} == {1.0, 1 - 2**-8}
    assert abs(mean - expected) <= 4 * 2**-9 / (count * 64 * 64) ** 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_no_bit_depends_on_the_run_on_the_batch_or_on_the_threads(threads, updated_by_c):
    weights = [dense(96, 132, seed=i, dtype=torch.bfloat16) for i in range(5)]
    grads = [dense(96, 132, seed=9 + i) for i in range(5)]
    keys = [rounding_key(0, i, torch.ones(1)) for i in range(5)]
    alone = [update([w], [g], [k])[0][0] for w, g, k in zip(weights, grads, keys, strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together, finite = update(weights, grads, keys)
    finally:
        torch.set_num_threads(before)
    assert finite == updated_by_c[-1] == [True] * 5
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_a_gradient_does_not_matter(scale, updated_by_c):
    (result,), _ = update([torch.zeros(32, 48)], [dense(32, 48) * scale], weight_decay=0.0)
    assert updated_by_c == [[True]]
    assert relative_error(result, exact(torch.zeros(32, 48), dense(32, 48))) <= 1e-6


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_that_are_not_kept_are_the_same_bits(shape, grad_dtype, monkeypatch):
    weight, grad = dense(*shape), dense(*shape, dtype=grad_dtype, seed=1)
    (kept,), _ = update([weight], [grad])
    monkeypatch.setattr(cpu_sinkgd, "_KEPT", 0)
    (anew,), finite = update([weight], [grad])
    assert finite == [True]
    assert torch.equal(kept, anew)


def spoiled(what):
    grad = dense(32, 48)
    grad[3] *= {"zero row": 0.0, "tiny row": 1e-20, "huge row": 1e20, "nan": torch.nan, "inf": torch.inf}.get(
        what, 1.0
    )
    return torch.zeros(32, 48) if what == "zero" else grad


@pytest.mark.parametrize("what", ["zero", "zero row", "tiny row", "huge row", "nan", "inf"])
def test_what_squares_cannot_hold_is_left_to_the_twin_and_the_rest_of_the_batch_is_not(
    what, monkeypatch, updated_by_c
):
    weights, grads = [dense(32, 48, seed=i) for i in range(3)], [dense(32, 48, seed=5), spoiled(what), dense(32, 48)]
    results, finite = update(weights, grads)
    assert updated_by_c == [[True, None, True]]
    expected, as_twin = twin(monkeypatch, weights, grads)
    assert finite == as_twin == [True, what not in ("nan", "inf"), True]
    assert torch.equal(results[1], expected[1])
    assert torch.equal(results[1], weights[1]) == (what in ("zero", "nan", "inf"))


def test_a_zero_column_stays():
    grad = dense(32, 48)
    grad[:, 7] = 0
    (result,), _ = update([torch.ones(32, 48)], [grad], weight_decay=0.0)
    assert torch.equal(result[:, 7], torch.ones(32))
    assert torch.isfinite(result).all()
    assert (result[:, :7] != 1).all()


def optimizer_of(weights):
    return StatelessOptimizer([{"params": weights, "algorithm": "multinorm", "weight_decay": 0.1}], lr=0.1)


def test_an_optimizer_steps_as_with_the_twin(monkeypatch, updated_by_c):
    def stepped():
        weights = [torch.nn.Parameter(dense(32, 48, seed=i, dtype=dtype)) for i, dtype in enumerate(DTYPES)]
        optimizer = optimizer_of(weights)
        for step in range(3):
            for i, weight in enumerate(weights):
                weight.grad = dense(*weight.shape, seed=10 * step + i, dtype=weight.dtype)
            optimizer.step()
        return weights, [optimizer.state[weight]["step"].item() for weight in weights]

    DTYPES = [torch.float32, torch.bfloat16, torch.float32]
    weights, steps = stepped()
    assert len(updated_by_c) == 6  # a call for each dtype
    monkeypatch.setenv("HF_STATELESS_KERNELS", "torch")
    expected, as_twin = stepped()
    assert len(updated_by_c) == 6
    assert steps == as_twin == [3, 3, 3]
    for weight, other in zip(weights, expected, strict=True):
        if weight.dtype == torch.float32:
            assert relative_error(weight.detach(), other.detach()) <= 1e-6
        else:
            assert (weight != other).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (torch.zeros(48, 32).mT, {}),
        (torch.zeros(2, 32, 48), {}),
        (torch.zeros(32, 48, dtype=torch.float64), {}),
        (torch.zeros(32, 48, dtype=torch.float16), {}),
        (torch.zeros(32, 48), {"layout": "in_out"}),
        (torch.zeros(32, 48), {"num_iterations": 2.5}),
        (torch.zeros(32, 48), {"norms": ("row_l2",)}),
    ],
    ids=["turned", "3-D", "float64", "float16", "in_out", "half step", "other chain"],
)
def test_other_weights_are_the_twins(weight, options, updated_by_c):
    grad = dense(*weight.shape, dtype=weight.dtype)
    (result,), _ = update([weight], [grad], **options)
    assert updated_by_c == []
    assert not torch.equal(result, weight)


def test_small_matrices_and_one_for_many_threads_are_left_to_torch(monkeypatch):
    W = torch.ones(256, 256)
    monkeypatch.setattr(cpu_sinkgd, "_SMALLEST", 1 << 16)
    monkeypatch.setattr(cpu_sinkgd, "_WORTH_THREADS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert cpu_sinkgd.fits([W, W], [W, W], LAYOUTS["out_in"], 5)
    assert not cpu_sinkgd.fits([W], [W], LAYOUTS["out_in"], 5)
    assert not cpu_sinkgd.fits([W[:255], W[:255]], [W[:255], W[:255]], LAYOUTS["out_in"], 5)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_stateless")]


@pytest.fixture
def forgotten():
    """A process that has compiled nothing yet."""
    caches = (cpu_compiler.compiled, cpu_sinkgd._kernel)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_the_compilation_is_told_once_with_its_time(caplog):
    caplog.set_level(logging.INFO, logger="hf_stateless")
    for _ in range(3):
        update([torch.zeros(32, 48)], [dense(32, 48)])
    (message,) = messages(caplog)
    assert message.startswith("Compiled cpu_sinkgd.c for this CPU in ")
    assert message.endswith(" s; HF_STATELESS_KERNELS=torch does without.")


@pytest.mark.usefixtures("forgotten")
def test_the_environment_variable_keeps_the_compiler_away(caplog, monkeypatch):
    monkeypatch.setenv("HF_STATELESS_KERNELS", "torch")
    monkeypatch.setattr(cpu_compiler, "_run", lambda command: pytest.fail("the compiler was called"))
    update([torch.zeros(32, 48)], [dense(32, 48)])
    assert messages(caplog) == []


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("how", ["no compiler", "it fails", "it writes nonsense"])
def test_without_a_working_compiler_torch_does_the_work(how, caplog, monkeypatch, tmp_path):
    scripts = {"it fails": "import sys; sys.exit('no disk\\nat all')", "it writes nonsense": NONSENSE}
    (tmp_path / "cc.py").write_text(scripts.get(how, ""))
    command = "a-compiler-that-is-not-there" if how == "no compiler" else f"{sys.executable} {tmp_path / 'cc.py'}"
    monkeypatch.setenv("CC", command)
    weight, grad = dense(32, 48), dense(32, 48, seed=1)
    with caplog.at_level(logging.WARNING, logger="hf_stateless"):
        (first,), _ = update([weight], [grad])
        update([weight], [grad])
    told = messages(caplog)
    assert len(told) == (how != "no compiler")
    assert all("Could not compile cpu_sinkgd.c, so torch does its work: " in message for message in told)
    assert how != "it fails" or told[0].endswith(": no disk")
    assert torch.equal(first, twin(monkeypatch, [weight], [grad])[0][0])


NONSENSE = "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('nonsense')"


HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(__file__).with_name("child").write_text(str(child.pid))
time.sleep(60)
"""
ANNOYING = {
    "it writes what is no UTF-8": (
        "import sys; sys.stderr.buffer.write(b'\\xff\\xfe no disk'); sys.exit(3)",
        "no disk",
    ),
    "it is silent": ("import sys; sys.exit(3)", "exit status 3"),
    "it is ended by a signal": ("import os; os.kill(os.getpid(), 11)", "exit status -11"),
    "it hangs": (HANGS, "it took more than 2 s"),
}


def is_alive(pid):
    """Whether a process runs; one that has ended but was not asked for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("how", [*ANNOYING, "a quote is open", "there is no place to write", "it cannot be started"])
def test_a_compiler_never_ends_a_run(how, caplog, monkeypatch, tmp_path):
    script, expected = ANNOYING.get(how, ("", ""))
    (tmp_path / "cc.py").write_text(script)
    monkeypatch.setenv("CC", f"{sys.executable} {tmp_path / 'cc.py'}")
    monkeypatch.setattr(cpu_compiler, "_LIMIT", 2.0)
    if how == "a quote is open":
        monkeypatch.setenv("CC", 'cc "')
    if how == "there is no place to write":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    if how == "it cannot be started":
        (tmp_path / "cc").write_text("#!/no/such/interpreter")
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
    weight, grad = dense(32, 48), dense(32, 48, seed=1)
    with caplog.at_level(logging.WARNING, logger="hf_stateless"):
        (first,), _ = update([weight], [grad])
        update([weight], [grad])
    (told,) = messages(caplog)
    assert told.startswith("Could not compile cpu_sinkgd.c, so torch does its work: ")
    assert expected in told
    assert "\n" not in told
    assert torch.equal(first, twin(monkeypatch, [weight], [grad])[0][0])
    if how == "it hangs":
        assert not is_alive(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (300, 220), (17000, 4), (4, 17000), (1, 70000)])
@given(exponent=st.floats(-45, 38), what=st.sampled_from(["dense", "rank 1", "zero rows", "zero columns", "spread"]))
@settings(max_examples=25, deadline=None)
def test_any_scale_gives_what_torch_gives(shape, dtype, exponent, what):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    if what == "rank 1":
        grad = grad[:, :1] * grad[:1]
    if what == "zero rows":
        grad[::3] = 0
    if what == "zero columns":
        grad[:, ::3] = 0
    if what == "spread":
        grad = grad * 10.0 ** torch.linspace(-3, 3, shape[0], dtype=torch.float64).unsqueeze(1)
    grad = (grad / grad.abs().amax() * 10.0**exponent).to(dtype)
    weight = torch.zeros(shape)
    (ours,), (finite,) = update([weight], [grad])
    with pytest.MonkeyPatch.context() as patch:
        (theirs,), (expected,) = twin(patch, [weight], [grad])
    assert (finite, bool(ours.isfinite().all())) == (expected, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().amax()))
