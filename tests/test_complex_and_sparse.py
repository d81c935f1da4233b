"""Complex parameters and sparse gradients: refused by name where they cannot be updated, else as torch does it."""

import pytest
import torch
from torch import nn

from hf_stateless import StatelessOptimizer, create_optimizer
from hf_stateless.optimizer.rules import RULES


class Waves(nn.Module):
    """Real linear layers around a complex matrix or vector."""

    def __init__(self, **shapes):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.complex64)))

    def forward(self, x):
        x = self.first(x).to(torch.complex64)
        x = x @ self.mixing if hasattr(self, "mixing") else x
        return self.last((x * self.phase if hasattr(self, "phase") else x).real)


@pytest.mark.parametrize("algorithm", [name for name, rule in RULES.items() if not rule.takes_complex])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_matrix_is_refused_by_name(algorithm, dtype):
    weights = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4, dtype=dtype))]
    group = {"params": weights, "param_names": ["a", "layer.mixing"], "algorithm": algorithm}
    with pytest.raises(ValueError, match=r"layer\.mixing is complex.*optim_target_modules"):
        StatelessOptimizer([group])


@pytest.mark.parametrize("name", ["swan", "sinkgd", "multinorm", "sinkgd_layerwise"])
def test_complex_parameters_beside_the_matrices_train_in_adamw_as_in_torch(name):
    torch.manual_seed(0)
    model, twin = Waves(phase=(6,), mixing=(6, 6)), Waves(phase=(6,), mixing=(6, 6))
    twin.load_state_dict(model.state_dict())
    options = {"weight_decay": 0.0, "lr": 1e-2}
    optimizer = create_optimizer(model, name, **options)
    theirs = torch.optim.AdamW([twin.phase, twin.mixing], **options)
    for _ in range(3):
        optimizer.train()
        x = torch.randn(5, 6)
        real = {name: value for name, value in model.state_dict().items() if not value.is_complex()}
        twin.load_state_dict(real, strict=False)
        twin(x).square().mean().backward()
        model(x).square().mean().backward()
        theirs.step()
        optimizer.step()
        theirs.zero_grad()
        twin.zero_grad()
        optimizer.zero_grad()
        torch.testing.assert_close(model.phase, twin.phase, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.mixing, twin.mixing, rtol=1e-5, atol=1e-6)


def test_a_complex_gradient_that_is_not_finite_changes_nothing(caplog):
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = StatelessOptimizer([{"params": [weight], "algorithm": "adamw"}])
    weight.grad = torch.tensor([1, 1j * float("nan"), 1], dtype=torch.complex64)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3, dtype=torch.complex64))
    assert "NaN or infinite" in caplog.text


@pytest.mark.parametrize("algorithm", ["adamw", "sinkhorn_momentum", "factored", "multinorm"])
def test_a_sparse_gradient_gets_one_line_with_the_name(algorithm):
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = StatelessOptimizer(
        [{"params": [table.weight], "param_names": ["embed.weight"], "algorithm": algorithm}]
    )
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match=r"gradient of embed\.weight is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before)


@pytest.mark.parametrize("release", ["matrices", "all"])
@pytest.mark.parametrize("embeddings", ["adamw", "stateless"])
def test_a_sparse_gradient_gets_the_line_under_layer_wise_names_too(release, embeddings):
    model = torch.nn.ModuleDict({"e": torch.nn.Embedding(8, 4, sparse=True), "a": torch.nn.Linear(4, 4)})
    optimizer = create_optimizer(model, "sinkgd_layerwise", lr=1e-2, release=release, embeddings=embeddings)

    def step():
        model["a"](model["e"](torch.tensor([1, 2]))).pow(2).sum().backward()
        optimizer.step()

    with pytest.raises(ValueError, match=r"gradient of e\.weight is sparse.*type sparse=False"):
        step()
