"""Which rule the parameters of embeddings and heads get, by shape and by what was asked for."""

import pytest
import torch
from torch import nn

from hf_stateless import create_optimizer
from hf_stateless.optimizer.options import OPTIONS
from hf_stateless.optimizer.rules import RULES


DEFAULT = OPTIONS["embeddings"].default
BY_ROWS = [name for name, rule in RULES.items() if rule.for_tables and rule.by_rows]


class Codebooks(nn.Embedding):
    """A parameter of another shape in the place of a table."""

    def __init__(self, *shape):
        super().__init__(4, 6)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, tokens):
        rows = self.weight.reshape(-1, 6)
        return rows[tokens % len(rows)]


class Model(nn.Module):
    """A backbone of one matrix between codebooks and a head of any kind."""

    def __init__(self, codebooks, head):
        super().__init__()
        self.embed = codebooks
        self.layer = nn.Linear(6, 6)
        self.lm_head = head

    def forward(self, tokens):
        hidden = self.layer(self.embed(tokens))
        return self.lm_head(hidden[:, :, None, None] if isinstance(self.lm_head, nn.Conv2d) else hidden)


MODELS = {
    "codebooks": lambda: Model(Codebooks(2, 3, 6), nn.Linear(6, 5)),
    "codebooks of four dimensions": lambda: Model(Codebooks(2, 1, 3, 6), nn.Linear(6, 5)),
    "a convolution as head": lambda: Model(nn.Embedding(7, 6), nn.Conv2d(6, 5, 1)),
    "one row": lambda: Model(nn.Embedding(1, 6), nn.Linear(6, 1)),
    "one column": lambda: Model(Codebooks(6, 1), nn.Linear(6, 5)),
    "one number a row": lambda: Model(Codebooks(6), nn.Linear(6, 5)),
}


def made(kind, **options):
    torch.manual_seed(0)
    model = MODELS[kind]()
    optimizer = create_optimizer(model, "sinkgd", lr=1e-2, **options)
    rules = {n: g["algorithm"] for g in optimizer.param_groups for n in g["param_names"]}
    return model, optimizer, rules


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_table_of_two_dimensions_takes_adamw_where_nothing_was_asked_for(kind):
    model, optimizer, rules = made(kind)
    for name, p in model.named_parameters():
        if name != "layer.weight":
            table = p.ndim == 2 and not name.startswith("layer")
            assert rules[name] == (DEFAULT if table else "adamw"), name
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        tokens = torch.zeros(3, dtype=torch.long) if kind == "one row" else torch.arange(3) + step
        model(tokens).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("rule", BY_ROWS)
@pytest.mark.parametrize("kind", MODELS)
def test_more_dimensions_are_refused_in_one_line_where_a_rule_was_asked_for(kind, rule):
    model = MODELS[kind]()
    large = [(name, p) for name, p in model.named_parameters() if p.ndim > 2]
    if not large:
        assert rule in made(kind, embeddings=rule)[2].values()
        return
    [(name, p)] = large
    key = "heads" if "head" in name else "embeddings"
    with pytest.raises(ValueError, match=rf"{name} has the shape \({p.shape[0]}.*type {key}=adamw") as error:
        made(kind, embeddings=rule)
    assert "\n" not in str(error.value)
    others = {"embeddings": rule, "heads": "adamw"} if key == "heads" else {"embeddings": "adamw", "heads": rule}
    assert made(kind, **others)[2][name] == "adamw"
    assert rule in made(kind, **others)[2].values()


@pytest.mark.parametrize("rule", BY_ROWS)
def test_biases_and_what_only_heads_have_are_never_meant(rule):
    rules = made("codebooks", heads=rule)[-1]
    assert (rules["embed.weight"], rules["lm_head.weight"], rules["lm_head.bias"]) == ("adamw", rule, "adamw")
