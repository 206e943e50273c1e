"""The pages say what is so: their examples run, and what they point to is there."""

import os
import pkgutil
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from test_project import ROOT

from moekit.notebook import parameters
from moekit.plain import NAMES as PLAIN_NAMES

PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "moekit/README.md",
        "moekit/ranks/README.md",
        "notebooks/README.md",
        "moekit/checkpoint/README.md",
        "moekit/nn/kernels/README.md",
        "moekit/plugin/README.md",
        "moekit/tasks/README.md",
        "moekit/demo/README.md",
        "moekit/routing/README.md",
        "docker/README.md",
        "docker/cluster/README.md",
        "tests/README.md",
    )
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
on_each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
EXAMPLES = [
    pytest.param(page, code, id=f"{name} {number}")
    for page, name in zip(PAGES, NAMES, strict=True)
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_examples_run(page, code, capsys, monkeypatch):
    """From the repository's folder, each with nothing but what it imports; what an example registers is forgotten."""
    from moekit.nn.gates import GATES
    from moekit.nn.operations import BACKENDS
    from moekit.routing.metrics import METRICS

    monkeypatch.chdir(ROOT)
    tables = GATES, BACKENDS, METRICS
    before = [dict(table) for table in tables]
    try:
        exec(compile(code, str(page), "exec"), {"__name__": "page"})
    finally:
        for table, kept in zip(tables, before, strict=True):
            table.clear()
            table.update(kept)
    assert capsys.readouterr().out


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@on_each_page
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", prose(page)):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@on_each_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)(?:\w+=\S+ )?make ([a-z][\w-]*)", page.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def is_there(name: str, page: Path) -> bool:
    """Whether a file or folder of that name is beside the page, or in the package or repository around it."""
    return any(any(place.glob(name.rstrip("/"))) for place in (page.parent, ROOT / "moekit", ROOT))


@on_each_page
def test_names_in_backticks_exist(page):
    """Files, folders of the repository, modules and what is in them."""
    for name in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"[\w./*-]+\.(py|ipynb|md)", name) or re.fullmatch(r"[\w./-]+/", name):
            if not name.startswith(("/", "out/", "data/", "~")):
                assert is_there(name, page), name
        elif match := re.fullmatch(r"(moekit(?:\.\w+)+)(\(.*\))?", name):
            pkgutil.resolve_name(match[1])
        elif match := re.match(r"python -m (moekit[\w.]*)", name):
            assert (ROOT / match[1].replace(".", "/")).with_suffix(".py").exists() or (
                ROOT / match[1].replace(".", "/") / "__main__.py"
            ).exists(), name


def test_the_picture_of_the_rooms_is_the_contract():
    """The layers on the page are those that ``make lint`` checks, and all that the package has."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "moekit/README.md").read_text(), re.DOTALL)[1]
    drawn = [set(re.split(r" {2,}", line)[0].split(" | ")) for line in block.strip().splitlines()]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert drawn == [set(re.findall(r"\w+", layer)) for layer in layers]
    package = {
        p.stem for p in (ROOT / "moekit").iterdir() if (p / "__init__.py").exists() or p.suffix == ".py"
    }
    assert set().union(*drawn) == package - {"__init__"}


# a parameter's name, its default and what is expected, in a table of the page of the notebooks
ROW = re.compile(r"^\| `(\w+)` \| (`.*?`) \| (.*?) \| ", re.MULTILINE)


def section_of(title: str) -> str:
    """The text below a title of the page of the notebooks."""
    text = (ROOT / "notebooks/README.md").read_text()
    return re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebooks_page_has_their_parameters(path):
    """Names and defaults are those of the notebook's cell, and what is expected is what its table says."""
    cells = nbformat.read(path, as_version=4).cells
    cell = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    values: dict = {}
    exec(cell.source, {"__builtins__": {}}, values)
    kinds = getattr(parameters, path.stem.upper())
    section = section_of(path.stem)
    rows = [
        (name, f"`{value!r}`", kinds[name].expected + (" or None" if kinds[name].optional else ""))
        for name, value in values.items()
    ]
    shared = (
        ROW.findall(section_of("The model's parameters")) if "](#the-models-parameters)" in section else []
    )
    names = {name for name, *_ in shared}
    assert shared == [row for row in rows if row[0] in names]
    assert ROW.findall(section) == [row for row in rows if row[0] not in names]


def test_the_models_parameters_are_those_of_each_notebook_with_a_model():
    """Each notebook with ranks names the one table and has none of its rows; its sentence names these notebooks."""
    shared = section_of("The model's parameters")
    names = {name for name, *_ in ROW.findall(shared)}
    tables = (parameters.MODEL, parameters.EXPERTS, parameters.RANKS, parameters.FETCHED)
    assert names == set().union(*tables) - {"output_dir"}
    with_model = [
        path.stem
        for path in (ROOT / "notebooks").glob("*.ipynb")
        if names <= {*vars(parameters)[path.stem.upper()]}
    ]
    for name in with_model:
        section = section_of(name)
        assert "](#the-models-parameters)" in section and not names & {
            one for one, *_ in ROW.findall(section)
        }
    assert {*re.findall(r"\w+", shared.partition(" load a model")[0])} - {"and"} == {*with_model}


def test_the_page_has_the_names_of_a_plain_module():
    found = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", (ROOT / "moekit/README.md").read_text(), re.MULTILINE)
    assert PLAIN_NAMES.items() <= dict(found).items()


def test_the_readme_is_short():
    assert 550 < len((ROOT / "README.md").read_text().split()) <= 720


def test_no_page_is_missing():
    """Pages of folders are in the list; recordings have pages of their own."""
    found = {
        Path(folder, name)
        for folder, folders, names in os.walk(ROOT)
        for name in names
        if name == "README.md"
        and not {".venv", "out", "build", "data"} & set(Path(folder).relative_to(ROOT).parts)
        and not any(part.startswith(".") for part in Path(folder).relative_to(ROOT).parts)
    }
    assert found == set(PAGES)
