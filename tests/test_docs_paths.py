"""Nothing that a document points to is missing, and nothing in the tree points at the machine it was written on."""

import re
from itertools import product
from pathlib import Path

import pytest
from documents import ROOT, blocks, guides, markdown_pages, read, section, tables, tracked_files


EXTENSIONS = ["py", "yaml", "yml", "md", "json", "jinja", "toml", "txt", "sh", "png", "cff"]
# What a run writes and what a reader brings: a document may name it although it is not in the tree.
OUTSIDE = ("runs/", "data/")

LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?<![\w./:~$-])[\w.{{}},*-]+(?:/[\w.{{}},*-]+)+\.(?:{'|'.join(EXTENSIONS)})\b")
FOLDER = re.compile(r"(?<![\w./:~$-])(?:recipes|hub_cards|tests|hf_stateless|\.ci)/[\w./{},*-]*")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FOLDERS = sorted({name.split("/")[1] for name in tracked_files() if re.match("hf_stateless/.+/", name)})
MACHINE = re.compile(r"(?<![\w.])/(?:home/\w+|Users/\w+|root|work|tmp/w)/")
REGISTRY = re.compile(r"--(?:extra-)?index-url")


def expand(path):
    """Every path that `a/{b,c}.yaml` stands for."""
    parts = re.split(r"\{([^}]*)\}", path)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def missing(path, folder=ROOT):
    """The forms of a path (braces and stars expanded) that stand neither beside the page nor below the root."""
    forms = [form.rstrip(".") for form in expand(path)]
    return [form for form in forms if not any(any(base.glob(form)) for base in {folder, ROOT})]


def slug(heading):
    """The anchor that a Markdown heading gets on the usual hosts."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def paths_in(text):
    found = {match.group() for pattern in (PATH, FOLDER) for match in pattern.finditer(text)}
    return {path for path in found if not path.startswith(OUTSIDE)}


@pytest.mark.parametrize("page", markdown_pages())
def test_links_of_a_page_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in LINK.findall(read(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = folder / file if file else ROOT / page
        assert there.exists(), f"{page} links to {target}, which is not there"
        if anchor:
            anchors = {slug(heading) for heading in HEADING.findall(there.read_text(encoding="utf-8"))}
            assert anchor in anchors, f"{page} links to the heading {target}, which is not there"


@pytest.mark.parametrize("page", [page for page in guides() if page != "README.md"])
def test_the_readme_leads_to_every_page_and_each_leads_back(page):
    assert page in {target.split("#")[0] for target in LINK.findall(read("README.md"))}
    if not page.startswith("hub_cards/"):
        up = "../" * page.count("/") + "README.md"
        assert up in LINK.findall(read(page)), f"{page} does not link back to README.md"


@pytest.mark.parametrize("page", markdown_pages())
def test_paths_named_on_a_page_exist(page):
    code = " ".join(CODE_SPAN.findall(read(page)) + [block.code for block in blocks(page, "bash")])
    gone = sorted(form for path in paths_in(code) for form in missing(path, (ROOT / page).parent))
    assert gone == [], f"{page} names files that are not there"


def listed_files(page):
    """What the table below "Files" names in its first column, as often as it does."""
    rows = re.findall(r"^\| (`[^|]*) \|", section(page, "Files"), re.MULTILINE)
    return sorted(name for row in rows for name in CODE_SPAN.findall(row))


def files_and_folders(folder):
    """The Python files of a folder and the folders in it; what only gathers the others is no content of its own."""
    below = [name.removeprefix(f"{folder}/") for name in tracked_files() if name.startswith(f"{folder}/")]
    files = {name for name in below if "/" not in name and name.endswith(".py")}
    return sorted(files - {"__init__.py"} | {f"{name.split('/')[0]}/" for name in below if "/" in name})


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_page_of_a_folder_lists_exactly_its_files(folder):
    assert listed_files(f"hf_stateless/{folder}/README.md") == files_and_folders(f"hf_stateless/{folder}")


def named_tests(text):
    """The tests that a text names as `tests/test_x.py::test_y`, or `::test_z` of the file named before."""
    file = ""
    for named, test in re.findall(r"`(tests/\w+\.py)?::(\w+)`", text):
        file = named or file
        yield file, test


def missing_tests(text):
    """Those that no file of the tests defines."""
    return [
        f"{file}::{test}"
        for file, test in named_tests(text)
        if file not in tracked_files() or not re.search(rf"^def {test}\(", read(file), re.MULTILINE)
    ]


@pytest.mark.parametrize("page", markdown_pages())
def test_tests_named_on_a_page_exist(page):
    assert missing_tests(read(page)) == [], f"{page} names tests that are not there"


def test_every_claim_about_ranks_names_a_test_that_shows_it():
    [(_, rows)] = tables("Setup", "Result", "Tested on", "Test")
    bare = [row[0] for row in rows if not list(named_tests(row[3])) and row[1] != "not measured"]
    assert bare == []
    assert len(rows) > 10


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("`tests/test_docs_paths.py::test_tests_named_on_a_page_exist`, `::named_tests`", []),
        ("`tests/test_docs_paths.py::test_no_such_claim`", ["tests/test_docs_paths.py::test_no_such_claim"]),
        ("`tests/test_none.py::test_a`, `::test_b`", ["tests/test_none.py::test_a", "tests/test_none.py::test_b"]),
    ],
)
def test_a_test_that_is_named_and_not_there_is_found(text, gone):
    assert missing_tests(text) == gone


LAUNCHES = [
    (name, number, line)
    for name in tracked_files()
    if Path(name).suffix in {".md", ".py", ".yaml", ".yml"} and not name.startswith("tests/")
    for number, line in enumerate(read(name).splitlines(), start=1)
    if re.search(r"accelerate launch .*recipes/", line)
]


@pytest.mark.parametrize(("name", "number", "line"), LAUNCHES, ids=[f"{name}:{n}" for name, n, _ in LAUNCHES])
def test_files_of_a_launch_command_exist(name, number, line):
    gone = sorted(form for path in paths_in(line) for form in missing(path))
    assert gone == [], f"{name}:{number} launches files that are not there"


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["machine path", "registry host"])
def test_no_file_points_at_the_machine_it_was_written_on(pattern):
    leaks = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in tracked_files()
        if Path(name).suffix not in {".png", ".safetensors"}
        for number, line in enumerate(read(name).splitlines(), start=1)
        if pattern.search(line)
    ]
    assert leaks == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("accelerate launch recipes/a.py --config recipes/b/{x,y}.yaml", {"recipes/a.py", "recipes/b/{x,y}.yaml"}),
        ("look into `recipes/` first", {"recipes/"}),
        ("runs/mine/memory_report.json and https://example.org/a/b.py", set()),
    ],
)
def test_paths_are_found_where_they_stand(text, found):
    assert paths_in(text) == found


def test_braces_and_stars_are_expanded_before_a_path_is_looked_up():
    assert missing("tests/{conftest,no_such_file}.py") == ["tests/no_such_file.py"]
    assert missing("tests/test_docs_*.py") == []


@pytest.mark.parametrize(
    ("pattern", "leak"),
    [
        (MACHINE, "/".join(["see ", "home", "someone", "notes.md"])),
        (MACHINE, "/".join(["cd ", "work", "main"])),
        (REGISTRY, "-".join(["pip install torch ", "", "index", "url https://example.org"])),
    ],
)
def test_a_leak_is_recognised(pattern, leak):
    assert pattern.search(leak)
