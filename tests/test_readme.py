"""What the pages show works as shown: their Python blocks run, their commands exist with the flags they are given."""

import re
import tempfile
from functools import cache
from importlib.metadata import metadata

import pytest
import torch
from conftest import tiny_inputs
from datasets import Dataset
from documents import LIMIT, ROOT, blocks, commands, guides, markdown_pages, read, section, tables
from interpreters import forked
from push_worker import tiny_tokenizer

import hf_stateless
from hf_stateless import NORMS, PRESETS
from hf_stateless.norms.whitening import WHITENINGS
from hf_stateless.optimizer.options import OPTIONS, embeddings, option_table
from hf_stateless.trainer.optim_args import optimizer_names, valid_keys
from hf_stateless.update.width import WIDTH_RULES


PYTHON_BLOCKS = [block for page in guides() for block in blocks(page, "python")]
DIFFS = [block for page in guides() for block in blocks(page, "diff")]
EXECUTED = [block for block in PYTHON_BLOCKS if block.no_test is None]
# A card in a folder of hub_cards/ says what was typed in the run that wrote it.
PAGES = [page for page in markdown_pages() if not re.fullmatch(r"hub_cards/.+/README\.md", page)]
COMMANDS = [(block, words) for page in PAGES for block, words in commands(page) if block.no_test is None]
# Read by the parsers of TRL before argparse sees the command line, so `--help` does not list it.
CONFIG_FLAG = "--config"


@pytest.fixture
def reader_objects(make_model, tmp_path, monkeypatch):
    """What a reader already has, under the names of the pages: a model, its folder and tokenizer, and datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    batch = tiny_inputs("llama", batch_size=8)
    rows = [{name: values[row] for name, values in batch.items()} for row in range(8)]
    model, tokenizer = make_model("llama"), tiny_tokenizer()
    model.save_pretrained("a-model")
    hf_stateless.quantize(make_model("llama")).save_pretrained("runs/sft-8bit")
    chats = Dataset.from_list([{"prompt": f"w{row} w3", "completion": f" w{row + 1}"} for row in range(8)])
    names = {"name": "a-model", "tokenizer": tokenizer, "chats": chats}
    return {"__name__": "readme", "model": model, "dataset": rows, **names}


@pytest.mark.parametrize("block", EXECUTED, ids=str)
def test_python_block_runs(block, reader_objects):
    before = {name: weight.clone() for name, weight in reader_objects["model"].state_dict().items()}
    if "runs/sft-8bit" in block.code:
        pytest.importorskip("compressed_tensors")
    if "import kernels" in block.code:  # no page needs it otherwise, and it is heavy
        pytest.importorskip("kernels")
    exec(compile(block.code, str(block), "exec"), reader_objects)  # an exception is the failure
    weights = reader_objects["model"].state_dict()
    assert weights.keys() == before.keys()
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("block", DIFFS, ids=str)
def test_both_sides_of_a_diff_train(block, reader_objects):
    lines = block.code.splitlines()
    model = reader_objects["model"]
    for other_side in ("+", "-"):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        code = "\n".join(line[1:] for line in lines if not line.startswith(other_side))
        exec(compile(code, str(block), "exec"), dict(reader_objects))
        assert any(not weight.equal(before[name]) for name, weight in model.state_dict().items()), code


def test_no_block_goes_untested():
    untested = [block for page in markdown_pages() for kind in ("python", "bash") for block in blocks(page, kind)]
    untested = [block for block in untested if block.no_test is not None]
    assert all(len(block.no_test.split()) >= 3 for block in untested), "give the reason after 'no-test:'"
    assert untested == [], f"{len(untested)} blocks are not tested: {', '.join(map(str, untested))}"


def test_the_pages_have_something_to_test():
    assert len(EXECUTED) >= 6
    assert [block.page for block in DIFFS] == ["README.md"]
    assert any(words[:2] == ["accelerate", "launch"] for _, words in COMMANDS)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=str)
def test_a_python_block_uses_the_public_face_only(block):
    assert "from hf_stateless" not in block.code
    assert "import hf_stateless." not in block.code
    assert set(re.findall(r"\bhf_stateless\.(\w+)", block.code)) <= set(hf_stateless.__all__)


def test_the_readme_is_short():
    lines = len(read("README.md").splitlines())
    assert lines <= LIMIT, f"README.md has {lines} lines, {LIMIT} at most: tell it on the page beside the code"


def test_the_readme_has_the_two_lines_that_a_reader_and_ci_start_with():
    lines = read("README.md").splitlines()
    assert lines.count('pip install -e ".[test]" && pytest -n 2') == 1
    assert sum('pip install -e ".[test]" && ' in line for line in lines) == 1
    assert lines.count("pip install -e . && accelerate launch recipes/pretrain.py") == 1


def test_the_readme_tells_what_the_package_requires():
    wanted = read("pyproject.toml")
    python = re.search(r'requires-python = ">=(.+)"', wanted)[1]
    torch_, transformers_ = (re.search(rf'"{name}>=(.+)"', wanted)[1] for name in ("torch", "transformers"))
    assert f"Python {python}, torch {torch_} and transformers {transformers_}, or newer" in read("README.md")


def test_the_first_run_takes_as_long_as_the_readme_says():
    recipe = read("recipes/llama-tiny/pretrain/sinkgd_polar.yaml")
    steps = int(re.search(r"^max_steps: (\d+)$", recipe, re.MULTILINE)[1])
    seconds = float(re.search(r"([\d.]+) s a step", recipe)[1])
    told = f": {steps} steps, about {steps * seconds / 60:.0f} minutes on two CPU cores (measured)"
    assert told in section("README.md", "Install")


def test_the_perplexities_of_the_smallest_recipe_are_those_of_its_table():
    ends = {row[0]: row[4] for row in table("Recipe", "Steps of 4,096 tokens")}
    ours = next(value for title, value in ends.items() if "no arguments" in title)
    adamw = min(value for title, value in ends.items() if "adamw.yaml" in title)
    told = f"The first run ends at perplexity {ours}, and AdamW with the same multiples at {adamw}"
    assert told in section("README.md", "Which learning rate?")
    assert f"ended at perplexity {adamw} " in read("recipes/llama-tiny/pretrain/sinkgd_polar.yaml")


@cache
def flags_of(*command):
    """The flags that a command of Python lists in its help."""
    with tempfile.NamedTemporaryFile("r") as file:
        status = forked([*command, "--help"], ROOT, file.name)
        text = file.read()
    assert status == 0, f"{command} --help: {text[-1000:]}"
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))


def split_launch(words):
    """The flags of `accelerate launch` or `python` itself, the script, and the flags of the script."""
    position = next(index for index, word in enumerate(words) if word.endswith(".py"))
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    own = [word.split("=")[0] for word in words[:position] if word.startswith("--")]
    return own, words[position], flags[len(own) :]


def check_pip(words):
    assert words[1] == "install"
    extras = set(metadata("hf_stateless").get_all("Provides-Extra"))
    for word in words:
        for extra in re.findall(r"\[(.*)\]", word):
            assert set(extra.split(",")) <= extras, f"pyproject.toml has no extra {extra!r}"


def check_launch(words):
    own, script, flags = split_launch(words)
    assert (ROOT / script).is_file(), f"{script} is not there"
    if own:
        assert set(own) <= flags_of("-m", "accelerate.commands.launch")
    unknown = set(flags) - {CONFIG_FLAG}
    if unknown:
        assert unknown <= flags_of(script), f"{script} has no such flag"


def check_pytest(words):
    flags = {word.split("=")[0] for word in words if word.startswith("-")}
    assert flags <= flags_of("-m", "pytest", "--noconftest")


def check_own_command(words):
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    assert flags <= flags_of("-m", "hf_stateless.run.command", words[1])


def check_vllm(words):
    """It is not installed for tests: a folder alone is what it needs."""
    assert words[1] == "serve"
    assert len(words) == 3


def check_hf(words):
    if words[1] == "stateless":
        check_own_command(words[1:])
    else:
        assert words[1] in ("extensions", "upload")


CHECKS = {
    "vllm": check_vllm,
    "pip": check_pip,
    "accelerate": check_launch,
    "python": check_launch,
    "pytest": check_pytest,
    "hf-stateless": check_own_command,
    "hf": check_hf,
}


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[f"{b}: {' '.join(w)[:60]}" for b, w in COMMANDS])
def test_command_exists_with_its_flags(block, words):
    assert words[0] in CHECKS, f"{block}: no check for '{words[0]}'; add one to CHECKS"
    CHECKS[words[0]](words)


def table(*headers):
    """The rows of the one table of the guides whose columns begin with these headers."""
    ((_, rows),) = tables(*headers)
    return rows


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    ("first_header", "names"),
    [
        ("Norm", set(NORMS)),
        ("Key", {key for name in optimizer_names() for key in valid_keys(name)}),
        ("Whitening", set(WHITENINGS)),
        ("`embeddings=`", set(embeddings())),
        ("`width_rule=`", set(WIDTH_RULES) - {"none"}),
    ],
)
def test_tables_list_exactly_what_the_package_has(first_header, names):
    for _, rows in tables(first_header):
        assert {name for row in rows for name in code(row[0])} == names


def test_the_table_of_options_is_the_one_that_the_package_makes():
    assert option_table() in read("hf_stateless/trainer/README.md")


def test_the_options_people_change_are_options_with_the_defaults_of_the_whole_table():
    full = {name: row[1] for row in table("Key") for name in code(row[0])}
    short = {name: row[1] for row in table("Option") for name in code(row[0])}
    assert len(short) == len(table("Option"))
    assert short.keys() <= full.keys()
    told = {"lr_scale": [f"{PRESETS[name].lr_scale} (`{name}`)" for name in ("swan", "sinkgd")]}
    for name, default in short.items():
        for part in told.get(name, [default]):
            assert part in default
            assert part in full[name]


@pytest.mark.parametrize("name", PRESETS)
def test_table_of_optimizers_agrees_with_the_presets(name):
    preset = PRESETS[name]
    row = next(
        row
        for row in table("Optimizer", "`optim` and `optim_args`")
        if code(row[1])[:2] == [name, "+".join(preset.norms)]
    )
    assert f", {preset.num_iterations} iteration" in row[1]
    assert preset.paper in row[2]
    assert f"{preset.lr_scale} (`{name}`" in {row[0]: row[1] for row in table("Key")}["`lr_scale`"]


@pytest.mark.parametrize("name", PRESETS)
def test_papers_are_cited_alike_on_cards_on_the_page_and_in_the_citation_file(name):
    citation, file = PRESETS[name].citation, read("CITATION.cff")
    assert citation in read("hf_stateless/norms/README.md")
    for key, value in re.findall(r"^  (title|url) += {+(.+?)}+,?$", citation, re.MULTILINE):
        assert f'{key}: "{value}"' in file
    for author in " and ".join(re.findall(r"author += {(.+)}", citation)).split(" and "):
        family, given = author.split(", ")
        assert re.search(rf'family-names: {family}\n +given-names: "?{given}"?\n', file)


@pytest.mark.parametrize("key", ["whitening", "embeddings", "stochastic_rounding", "seed"])
def test_default_of_an_option_is_the_one_in_the_table(key):
    row = next(row for row in table("Key") if code(row[0]) == [key])
    default = f"`{str(OPTIONS[key].default).lower()}`"
    assert row[1] == (OPTIONS[key].default_text or default)
    assert row[1].startswith(default)


@pytest.mark.parametrize("row", table("Whitening"), ids=lambda row: row[0].replace("`", ""))
def test_whitening_amplifies_small_singular_values_as_stated(row):
    name = code(row[0])[0]
    beta = re.search(r"beta ([\d.]+)", row[0])
    steps = re.search(r"(\d+) steps", row[0])
    options = ({"ns_steps": int(steps[1])} if steps else {}) | ({"ns_beta": float(beta[1])} if beta else {})
    small = 1e-6 if steps else 1e-3  # `eigh` has no steps: it takes every singular value to 1
    result = WHITENINGS[name](torch.diag(torch.tensor([1.0, small], dtype=torch.float64)), **options)
    stated = 1 / small if row[1] == "unbounded" else float(row[1])
    torch.testing.assert_close(result[1, 1].item() / small, stated, rtol=5e-3, atol=0)
