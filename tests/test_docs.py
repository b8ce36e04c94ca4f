"""What README, CONTRIBUTING and docs/ say holds: names, links, commands, Python."""

import functools
import importlib
import inspect
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mmfast
from mmfast import codes, gap, nn
from mmfast.ops import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(
    r"(?:^<!-- (needs|not run): (.*?) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def name_of(path):
    return str(path.relative_to(ROOT))


def text_of(path):
    """A page with the parts of other files that it includes."""

    def included(match):
        name, _, part = match[1].partition(":")
        text = (ROOT / name).read_text()
        if part:
            text = text.partition(f"[start:{part}] -->")[2].partition("<!-- --8<-- [end:")[0]
        assert text, f"{name_of(path)} includes {match[1]}, which is not there"
        return text

    return re.sub(r'^--8<-- "(.*)"$', included, path.read_text(), flags=re.MULTILINE)


def entries():
    """The names that pages of the API describe, in their order."""
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    return [x for page in pages for x in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def found(entry):
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_described_once():
    public = {f"mmfast.{name}" for name in mmfast.__all__ if name != "nn"}
    public |= {f"mmfast.nn.{name}" for name in nn.__all__}
    public |= {f"mmfast.gap.{name}" for name in gap.__all__ if name not in mmfast.__all__}
    public |= {f"mmfast.codes.{name}" for name in ("CodeUsage", "code_usage", "plot_codes")}
    assert set(vars(codes)) >= {"CodeUsage", "code_usage", "plot_codes"}
    assert Counter(entries()) == Counter(public)


def described():
    """Each entry, and the public methods of those that are classes."""
    for entry in entries():
        yield entry, found(entry)
        if inspect.isclass(found(entry)):
            for name, method in vars(found(entry)).items():
                if inspect.isfunction(method) and not name.startswith("_"):
                    yield f"{entry}.{name}", method


def test_docstrings_name_the_arguments_that_are_there():
    """All of them where there is an Args section, and none that is not there."""
    checked = 0
    for entry, x in described():
        _, _, section = inspect.getdoc(x).partition("\nArgs:\n")
        section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
        groups = re.findall(r"^    ((?:\w+, )*\w+): ", section, re.MULTILINE)
        named = [name for group in groups for name in group.split(", ")]
        if named:
            there = [name for name in inspect.signature(x).parameters if name != "self"]
            assert sorted(named) == sorted(there), entry
            checked += 1
    assert checked > 40


def anchors(path):
    """The ids that a page's headings and entries of the API get."""
    prose = CODE.sub("", text_of(path))
    headings = re.findall(r"^#+ +(.+?)\s*$", prose, re.MULTILINE)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", x).strip().lower()) for x in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", prose, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    prose = CODE.sub("", text_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_files_that_pages_name_are_there(page):
    text = text_of(page)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][\w,-]*)", "\n".join(commands(text))):
        rule = "ctest-%" if target.startswith("ctest-") else target
        assert re.search(rf"^{rule}:", makefile, re.MULTILINE), f"make {target}"
    for name in re.findall(
        r"\b(?:tests|bench|csrc|kernels|mmfast|examples)/[\w/]+\.(?:cpp|cu|h|md|py)\b", text
    ):
        assert (ROOT / name).exists(), name


def commands(text):
    """Indented lines and what stands between backticks."""
    return re.findall(r"^    .*$|`[^`\n]+`", CODE.sub("", text), re.MULTILINE)


def test_table_of_backends():
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$",
                      (ROOT / "docs/guide/backends.md").read_text(), re.MULTILINE)  # fmt: skip
    told = {op: tuple(re.findall(r"\w+", names)) for op, names in rows}
    assert told == {op: tuple(row.name for row in table) for op, table in BACKENDS.items()}


def there(module):
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def blocks():
    """Of each page the blocks without a mark, and each marked one after those before it."""
    for page in PAGES:
        plain = []
        for mark, what, source in BLOCK.findall(page.read_text()):
            if not mark:
                plain.append(source)
                continue
            reason = what if mark == "not run" else f"{what} is not installed"
            skip = pytest.mark.skipif(mark == "not run" or not there(what), reason=reason)
            yield pytest.param([*plain, source], id=f"{name_of(page)}, {what}", marks=skip)
        if plain:
            yield pytest.param(plain, id=name_of(page))


@pytest.mark.parametrize("sources", list(blocks()))
def test_python_runs(sources, monkeypatch):
    """The blocks of a page, in its order, in one namespace."""
    # the graph is traced whole, which is the claim; making code of it takes half a minute
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    features = F.normalize(torch.randn(2, 8, 4), dim=-1).requires_grad_()
    # what the lines of a trainer find there
    names = {"torch": torch, "F": F, "logit_scale": 14.3}
    names |= {"image_features": features[0], "text_features": features[1]}
    for source in sources:
        exec(compile(source, "a block of the page", "exec"), names)
