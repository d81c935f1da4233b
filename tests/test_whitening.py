"""Whitening iterations against their formulas in float64, over well and badly conditioned spectra."""

import pytest
import reference
import torch
from conftest import dense, gradients, relative_error, tiny_inputs
from hypothesis import given
from torch.utils.flop_counter import FlopCounterMode

import hf_stateless.norms.newton_schulz as module
import hf_stateless.norms.polar_express as express
from hf_stateless.norms import gram
from hf_stateless.norms.projections import row_standardize, spectral
from hf_stateless.norms.whitening import NS_DTYPES, WHITENINGS, eigh, newton_schulz, nsds, polar_express


SHAPES = [(1, 1), (1, 9), (9, 1), (7, 33), (33, 7), (48, 48), (48, 129), (129, 48)]
SPECTRA = {
    "flat": lambda i, k: torch.ones_like(i),
    "1/i": lambda i, k: 1 / i,
    "1/i^2": lambda i, k: i**-2.0,
    "log to 1e-4": lambda i, k: 10 ** (-4 * (i - 1) / max(k - 1, 1)),
    "log to 1e-6": lambda i, k: 10 ** (-6 * (i - 1) / max(k - 1, 1)),
    "half zero": lambda i, k: 10 ** (-4 * (i - 1) / max(k - 1, 1)) * (i <= k / 2),
}
FORMS = {"products": 10**9, "eigenvalues": 1}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both ways to evaluate the polynomial of Newton-Schulz, whatever the size of the matrix says."""
    monkeypatch.setattr(module, "_EIGENVALUES_FROM", FORMS[request.param])


def with_spectrum(m, n, spectrum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left, right = (
        torch.linalg.qr(torch.randn(size, k, dtype=torch.float64, generator=generator))[0] for size in (m, n)
    )
    values = SPECTRA[spectrum](torch.arange(1, k + 1, dtype=torch.float64), k)
    return ((left * values) @ right.mT).float()


def singular_values(x):
    return torch.linalg.svdvals(x.double())


def cosine(a, b):
    return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def test_the_table_of_whitenings_is_complete():
    assert set(WHITENINGS) == {"newton_schulz", "nsds", "eigh", "polar_express"}


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_the_papers_polynomial(shape, dtype):
    grad = dense(*shape, dtype=dtype)
    assert relative_error(newton_schulz(grad), reference.newton_schulz(grad)) <= 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(48, 48), (48, 129), (129, 48)])
def test_newton_schulz_is_the_papers_polynomial_on_every_spectrum(shape, spectrum):
    """Small singular values grow 6340 times, and a float32 Gram matrix loses those below 3e-4 of the largest."""
    grad = with_spectrum(*shape, spectrum)
    assert relative_error(newton_schulz(grad), reference.newton_schulz(grad)) <= 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES[3:])
@pytest.mark.parametrize(("steps", "beta"), [(1, 0.8), (2, 0.4), (5, 0.5), (6, 0.5), (6, 0.8), (10, 0.5), (15, 0.5)])
def test_newton_schulz_follows_its_steps_and_beta(shape, steps, beta):
    grad = dense(*shape)
    result = newton_schulz(grad, ns_steps=steps, ns_beta=beta)
    assert relative_error(result, reference.newton_schulz(grad, steps, beta)) <= 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES[3:])
def test_beta_one_half_is_the_cubic_iteration_for_the_polar_factor(shape):
    grad = dense(*shape)
    x = grad.double() / grad.double().norm()
    for _ in range(8):
        x = 1.5 * x - 0.5 * x @ x.mT @ x
    assert relative_error(newton_schulz(grad, ns_steps=8, ns_beta=0.5), x) <= 1e-5


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES)
def test_beta_one_half_converges_to_the_polar_factor(shape):
    grad = dense(*shape)
    assert relative_error(newton_schulz(grad, ns_steps=30, ns_beta=0.5), reference.polar(grad)) <= 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES[3:])
@pytest.mark.parametrize("spectrum", ["flat", "1/i"])
def test_beta_0_8_leaves_singular_values_in_its_band_before_the_rescaling(shape, spectrum):
    values = singular_values(newton_schulz(with_spectrum(*shape, spectrum)))
    assert values.min() >= 0.5
    assert values.max() <= 1.7


@pytest.mark.usefixtures("form")
def test_ten_steps_of_beta_0_8_amplify_a_vanishing_singular_value_6340_times():
    """Told apart from other polynomials by f'(0) = (3 beta)^k; a diagonal matrix keeps the two directions apart."""
    tiny = 1e-6
    result = newton_schulz(torch.tensor([[1.0, 0.0, 0.0], [0.0, tiny, 0.0]]))
    assert result[1, 1].item() / tiny == pytest.approx(2.4**10, rel=1e-4)


SWANS = [("polar_express", reference.swan), ("newton_schulz", reference.swan_of_the_paper)]


@pytest.mark.parametrize(("whitening", "expected"), SWANS)
@pytest.mark.parametrize("shape", SHAPES[3:])
def test_swan_matches_its_reference(shape, whitening, expected):
    grad = dense(*shape)
    assert relative_error(spectral(row_standardize(grad), whitening=whitening), expected(grad)) <= 1e-4


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("whitening", "expected"), SWANS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(48, 48), (48, 129), (129, 48)])
def test_swan_matches_its_reference_on_every_spectrum(shape, spectrum, whitening, expected):
    grad = with_spectrum(*shape, spectrum)
    assert relative_error(spectral(row_standardize(grad), whitening=whitening), expected(grad)) <= 1e-4


@pytest.mark.usefixtures("form")
def test_swan_matches_its_reference_on_the_gradients_of_a_language_model(make_model):
    model = make_model("llama")
    model(**tiny_inputs("llama")).loss.backward()
    for name, parameter in model.model.layers.named_parameters():
        for whitening, expected in SWANS if parameter.ndim == 2 else []:
            white = spectral(row_standardize(parameter.grad), whitening=whitening)
            assert relative_error(white, expected(parameter.grad)) <= 1e-4, (name, whitening)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("steps", "beta"), [(1, 0.4), (2, 0.4), (2, 0.8), (3, 0.5)])
def test_nsds_is_newton_schulz_with_diagonal_substitution(shape, steps, beta):
    grad = dense(*shape)
    assert relative_error(nsds(grad, ns_steps=steps, ns_beta=beta), reference.nsds(grad, steps, beta)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_eigh_is_the_polar_factor(shape, dtype):
    grad = dense(*shape, dtype=dtype)
    assert relative_error(eigh(grad), reference.polar(grad)) <= 1e-4


@pytest.mark.parametrize("spectrum", ["flat", "1/i", "1/i^2", "log to 1e-4"])
@pytest.mark.parametrize("shape", [(48, 48), (48, 129), (129, 48)])
def test_eigh_is_the_polar_factor_on_every_spectrum(shape, spectrum):
    grad = with_spectrum(*shape, spectrum)
    assert relative_error(eigh(grad), reference.polar(grad)) <= 1e-4


@pytest.mark.parametrize("shape", [(48, 48), (129, 48), (33, 7)])
def test_eigh_leaves_out_the_null_direction_that_row_centring_creates(shape):
    """G~ 1 = 0 makes every matrix with m >= n singular; inverting that direction would turn rounding into a step."""
    centred = row_standardize(dense(*shape))
    result = eigh(centred)
    assert cosine(result, reference.polar(centred, rtol=1e-5)) >= 0.9999
    assert torch.count_nonzero(singular_values(result) > 0.5).item() == min(shape) - 1


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", WHITENINGS)
def test_low_rank_gradients_stay_finite_and_keep_their_rank(name, rank):
    grad = dense(40, rank) @ dense(rank, 64, seed=1)
    values = singular_values(WHITENINGS[name](grad))
    assert values.isfinite().all()
    assert values[rank:].max() <= 5e-3 * values[0]


@given(grad=gradients(dtypes=(torch.float32, torch.bfloat16, torch.float16)))
def test_half_gradients_are_whitened_in_float32(grad):
    for whiten in WHITENINGS.values():
        result = whiten(torch.ldexp(grad.float(), -torch.frexp(grad.float().abs().max()).exponent).to(grad.dtype))
        assert result.dtype == torch.float32
        assert result.isfinite().all()


@pytest.mark.parametrize("shape", [(48, 129), (129, 48)])
@pytest.mark.parametrize(("steps", "least_cosine", "error"), [(5, 0.99, 0.3), (6, 0.999, 0.05), (8, 0.99999, 1e-3)])
def test_polar_express_approaches_the_polar_factor(shape, steps, least_cosine, error):
    grad = dense(*shape)
    result = polar_express(grad, ns_steps=steps)
    assert cosine(result, reference.polar(grad)) >= least_cosine
    assert (singular_values(result) - 1).square().mean().sqrt() <= error


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("steps", [12, 20])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ["newton_schulz", "polar_express"])
def test_more_steps_than_the_default_stay_bounded(name, spectrum, steps):
    """A negative eigenvalue of a rounded Gram matrix must not be amplified without end."""
    values = singular_values(WHITENINGS[name](with_spectrum(48, 48, spectrum), ns_steps=steps))
    assert values.max() <= 1.7


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", WHITENINGS)
@pytest.mark.parametrize("shape", [(5, 7, 16), (5, 16, 7), (2, 3, 8, 8)])
def test_a_batch_equals_a_loop_and_the_input_is_left_alone(name, shape):
    grad = dense(*shape)
    before = grad.clone()
    result = WHITENINGS[name](grad)
    loop = torch.stack([WHITENINGS[name](g) for g in grad.reshape(-1, *shape[-2:])]).view(shape)
    assert relative_error(result, loop) <= 1e-4
    assert torch.equal(grad, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whitenings_are_different_maps_and_not_faster_versions_of_one(shape):
    """All of them share the singular vectors, so U^T f(G) V is diagonal; only the singular values differ."""
    grad = dense(*shape)
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    for name in ("newton_schulz", "eigh", "polar_express"):
        rotated = u.mT @ WHITENINGS[name](grad).double() @ vh.mT
        assert relative_error(rotated, torch.diag(rotated.diagonal())) <= 1e-4


@pytest.mark.parametrize("shape", [(256, 300), (300, 256), (520, 520)])
def test_from_256_rows_on_a_cpu_takes_the_eigenvalues(shape, monkeypatch):
    calls = []
    decompose = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: calls.append(gram.shape) or decompose(gram))
    grad = with_spectrum(*shape, "log to 1e-6")
    assert relative_error(newton_schulz(grad), reference.newton_schulz(grad)) <= 1e-4
    assert calls == [(min(shape), min(shape))]
    newton_schulz(grad, ns_steps=5)
    newton_schulz(grad[:255, :255])
    assert len(calls) == 1


@pytest.mark.parametrize(("shape", "share"), [((64, 64), 0.625), ((64, 171), 0.87)])
def test_products_need_less_than_the_papers_iteration(shape, share):
    """Counted: the paper's coupled iteration takes a Gram matrix, 30 products of its size, and one with X."""
    m, n = shape
    with FlopCounterMode(display=False) as counter:
        newton_schulz(dense(*shape))
    assert counter.get_total_flops() <= share * 2 * (2 * m * m * n + 30 * m**3)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", [(newton_schulz, "float32"), (newton_schulz, "float16"), (polar_express, "bfloat16")])
def test_a_bad_entry_spoils_its_own_matrix_only(name):
    grad = dense(3, 16, 40)
    grad[1, 2, 3] = torch.nan
    whiten, ns_dtype = name
    result = whiten(grad, ns_dtype=ns_dtype)
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("spectrum", ["flat", "1/i", "1/i^2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float16_products_stay_close_to_the_polynomial(shape, spectrum):
    grad = with_spectrum(*shape, spectrum)
    result = newton_schulz(grad, ns_dtype="float16")
    assert result.dtype == torch.float32
    assert cosine(result, reference.newton_schulz(grad)) >= 0.9995


@pytest.mark.parametrize("shape", [(33, 61), (61, 33), (33, 33), (5461, 16)])
def test_float16_products_have_sizes_that_are_multiples_of_8(shape, monkeypatch):
    seen = []
    stage = module._stage
    monkeypatch.setattr(module, "_stage", lambda x, *rest: seen.append((x.dtype, x.shape)) or stage(x, *rest))
    grad = dense(*shape)
    assert newton_schulz(grad, ns_dtype="float16").shape == grad.shape
    assert [dtype for dtype, _ in seen[:2]] == [torch.float32, torch.float16]
    assert all(size % 8 == 0 for dtype, (_, *sizes) in seen if dtype == torch.float16 for size in sizes)


@pytest.mark.parametrize("name", NS_DTYPES)
@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float16", "float64", "half", ""])
def test_other_dtypes_of_the_products_are_refused(name, ns_dtype):
    if ns_dtype not in NS_DTYPES[name]:
        with pytest.raises(ValueError, match=rf"{name} takes no ns_dtype={ns_dtype}\. Valid: float32, b?float16\."):
            spectral(dense(4, 4), whitening=name, ns_dtype=ns_dtype)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize(("spectrum", "least"), [("flat", 0.998), ("1/i", 0.999), ("log to 1e-4", 0.985)])
@pytest.mark.parametrize("shape", [(48, 48), (300, 700), (700, 300)])
def test_polar_express_in_bfloat16_stays_close_to_float32(shape, spectrum, least, steps):
    grad = with_spectrum(*shape, spectrum)
    result = polar_express(grad, ns_steps=steps, ns_dtype="bfloat16")
    assert result.dtype == torch.float32
    assert cosine(result, polar_express(grad.double(), ns_steps=steps)) >= least
    assert singular_values(result).max() <= 1.1 * singular_values(polar_express(grad.double(), ns_steps=steps)).max()


@pytest.mark.parametrize(
    ("shape", "fast"), [((255, 400), True), ((256, 300), True), ((300, 256), True), ((300, 600), False)]
)
def test_products_are_in_bfloat16_where_they_are_large_and_the_device_is_fast_in_it(shape, fast, monkeypatch):
    monkeypatch.setattr(express, "multiplies_in_bfloat16", lambda device_type: fast)
    grad = dense(*shape)
    expected = "bfloat16" if fast and min(shape) >= 256 else "float32"
    assert torch.equal(polar_express(grad), polar_express(grad, ns_dtype=expected))
    assert polar_express(grad.double()).dtype == torch.float64
    assert relative_error(polar_express(grad.double()), polar_express(grad, ns_dtype="float32")) <= 1e-4


def test_what_is_fast_in_bfloat16_is_known_for_each_kind_of_device(monkeypatch):
    ask = express.multiplies_in_bfloat16.__wrapped__
    monkeypatch.setattr(express, "cpu_has", gram.cpu_has.__wrapped__)
    for capabilities in ({"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_f": True}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert ask("cpu") == any(name.endswith("bf16") for name in capabilities)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not ask("cpu")
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert ask("cuda") == supported
    assert [ask(kind) for kind in ("xpu", "meta", "mps", "hpu")] == [True, True, False, False]


@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (2, 90, 400), (2, 3, 40, 9)])
def test_on_a_cpu_a_result_lies_in_the_order_of_memory_and_the_gradient_stays(shape, ns_dtype):
    grad = dense(*shape)
    before = grad.clone()
    result = polar_express(grad, ns_dtype=ns_dtype)
    assert result.is_contiguous()
    assert torch.equal(grad, before)
    flat = torch.stack([polar_express(one, ns_dtype=ns_dtype) for one in grad.reshape(-1, *shape[-2:])])
    assert torch.equal(result, flat.view(shape))
    strided = grad.movedim(0, -1).clone().movedim(-1, 0)  # another order of memory, which no view makes a batch of
    assert torch.equal(polar_express(strided, ns_dtype=ns_dtype), result)
