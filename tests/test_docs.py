"""Documents: every link, path, module and test that one names exists; code names no document that is not here; messages use plain words."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
SOURCES = sorted(path for folder in ("trainer", "sparsity", "launch") for path in (ROOT / folder).rglob("*.py"))
NAMING = [
    *SOURCES,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
]  # files that name documents

PATH = re.compile(r"(?<![\w./-])(?:tests|trainer|sparsity|launch|configs|docs)/[\w./*{},-]*")
MODULE = re.compile(r"(?<![\w./-])(?:tests|trainer|sparsity|launch)(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
IMPORT = re.compile(r"\bfrom ((?:tests|trainer|sparsity|launch)[\w.]*) import (\w+(?:, \w+)*)")
TEST = re.compile(r"`(tests/[\w/]+\.py)`|`(test_\w+)`")

# The rule of CONTRIBUTING.md, section Words, as far as a search can keep it: patterns of words that messages must not use.
UNPLAIN = [
    *(
        rf"\b{word}\b"
        for word in ("told", "tells", "said", "says", "nobody", "somebody", "whoever", "deaf", "shelf", "ow(?:ed|es)")
    ),
    *(
        rf"\b{word}\b"
        for word in ("mend(?:s|ed|ing)?", "eats", "bur(?:y|ies|ied)", "held against", "ways? out", "on paper", "in vain")
    ),
    *(r"\bthe wall\b(?! time| clock)", r"\bmind:", r"\bthere (?:are|is no) [{']", r"\b(?:no|make) room\b"),
    r"(?<!there )\bis no (?!longer|later|larger|smaller|more|less|faster|slower)",
]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sections(text: str) -> list[str]:
    """Titles of a Markdown text, code blocks left out."""
    return re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def anchor(title: str) -> str:
    """The anchor that GitHub gives a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def exists(name: str) -> bool:
    """A path below the root. `*`, {a,b}, words in capitals (tri_level_KEEP.yaml) and single letters (configs/a.yaml) stand for any name."""
    if braces := re.search(r"\{([^{}]*)\}", name):
        return all(exists(name[: braces.start()] + part + name[braces.end() :]) for part in braces[1].split(","))
    pattern = re.sub(r"[A-Z]{3,}(?!\w*\.md)|(?<=/)[a-z](?=\.yaml)", "*", name.rstrip(".,/"))
    return any(ROOT.glob(pattern))


def module_exists(name: str) -> bool:
    """A module, or a name that its module's text holds."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return all(re.search(rf"\b{part}\b", file.read_text()) for part in parts[length:])
    return False


def holds(module: str, name: str) -> bool:
    """Whether the text of a module holds a name."""
    base = ROOT.joinpath(*module.split("."))
    files = [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
    return any(re.search(rf"\b{name}\b", file.read_text()) for file in files)


def functions_of(path: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.M))


@pytest.mark.parametrize("document", DOCUMENTS, ids=short)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    missing = [name for name in PATH.findall(text) if not exists(name)]
    missing += [name for name in MODULE.findall(text) if not exists(name) and not module_exists(name)]
    missing += [
        f"{module}.{name}" for module, names in IMPORT.findall(text) for name in names.split(", ") if not holds(module, name)
    ]
    for target, title in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file = (document.parent / target).resolve() if target else document
        if not file.exists() or (title and title not in map(anchor, sections(file.read_text()))):
            missing.append(f"{target}#{title}" if title else target)
    assert not missing


def test_every_law_names_tests_and_every_test_it_names_exists() -> None:
    text = (ROOT / "docs" / "laws.md").read_text()
    numbers = [int(number) for number in re.findall(r"^## (\d+)\. ", text, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    for law in re.split(r"^## (?=\d)", text, flags=re.M)[1:]:
        file, named = "", 0
        for path, test in TEST.findall(law.split("\n# ")[0]):
            file = path or file
            assert not test or test in functions_of(file), f"{file}: {test}"
            named += 1
        assert named, law.splitlines()[0]


def test_every_test_that_the_methods_name_exists() -> None:
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in functions_of(short(path))}
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "methods.md").read_text())
    assert len(named) > 20 and not set(named) - known


def test_code_names_documents_that_are_here() -> None:
    """`docs/laws.md, law 3`, `docs/methods.md, section Tokens`: file, law and section exist; and no other document is spoken of."""
    titles = {short(document): sections(document.read_text()) for document in DOCUMENTS}
    laws = {re.match(r"(\d+)\.", title)[1] for title in titles["docs/laws.md"] if re.match(r"\d+\.", title)}  # pyright: ignore[reportOptionalSubscript]
    elsewhere = re.compile(r"\bmethods \d|\[(?:code|ours|calc|paper)\]|\bthe issue\b|\bof the design\b|\.\./shared\b")
    wrong = []
    for file in NAMING:
        if file == Path(__file__).resolve():
            continue
        text = re.sub(r"\s*\n\s*(?:# )?", " ", file.read_text())
        wrong += [f"{short(file)}: {name}" for name in re.findall(r"\bdocs/[\w/.-]+\.md\b", text) if name not in titles]
        wrong += [
            f"{short(file)}: section {name}"
            for of, name in re.findall(r"(docs/[\w/.-]+\.md), section ([A-Z]\w+)", text)
            if not any(title.startswith(name) for title in titles.get(of, []))
        ]
        for before, numbers in re.findall(r"(.{15})\b[Ll]aws? (\d+(?:, \d+)*(?: and \d+)?(?: of docs/laws\.md)?)", text):
            if "laws.md" not in before + numbers or set(re.findall(r"\d+", numbers)) - laws:
                wrong.append(f"{short(file)}: law {numbers} without docs/laws.md, or not in it")
        wrong += [f"{short(file)}: {match[0]}" for match in elsewhere.finditer(text)]
    assert not wrong


def test_the_picture_of_the_packages_shows_the_contracts() -> None:
    """docs/architecture.md draws every layer of the import contracts, in their order."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {contract["containers"][0]: contract["layers"] for contract in contracts if "containers" in contract}
    picture = re.search(r"^```\n(launch .*?)^```", (ROOT / "docs" / "architecture.md").read_text(), re.M | re.S)
    assert picture
    drawn: dict[str, list[str]] = {name: [] for name in layers}
    package = inner = ""
    for line in picture[1].splitlines():
        words = re.split(r" {2,}", line.strip())[0]
        if re.match(r"\w", line):
            package = words
        elif re.match(r" {3}\w\w", line):
            drawn[package].append(words)
            inner = next((f"{package}.{name}" for name in words.split(" | ") if f"{package}.{name}" in layers), "")
        elif re.match(r" {6}\w", line):
            drawn[inner].append(words)
    assert drawn == layers


def strings(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the strings of a file that may reach a user: docstrings are left out, and what has no space (keys, names).
    `{` stands for the value in an f-string."""
    tree = ast.parse(file.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings, of modules to constants
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone | parts:
            text = node.value
        if " " in text:
            yield node.lineno, text  # pyright: ignore[reportAttributeAccessIssue]


def unplain(file: Path) -> list[str]:
    pattern = re.compile("|".join(UNPLAIN), re.I)
    found = sorted((line, match[0], text) for line, text in strings(file) for match in pattern.finditer(text))
    return [f"{file.name}:{line}: {word!r} in {text[:100]!r}" for line, word, text in found]


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=short)
def test_documents_use_plain_words(document: Path) -> None:
    """Code, in blocks and in backticks, is left out."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", lambda code: "\n" * code[0].count("\n"), document.read_text(), flags=re.M | re.S)
    pattern = re.compile("|".join(UNPLAIN), re.I)
    found = [f"{number}: {word[0]!r}" for number, line in enumerate(text.splitlines(), 1) for word in pattern.finditer(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ["trainer", "sparsity", "launch"])
def test_messages_use_plain_words(package: str) -> None:
    """Errors, console lines, tables and help texts: every string of the code with a space in it."""
    found = [line for file in SOURCES if short(file).startswith(package) for line in unplain(file)]
    assert not found, "\n".join(found)


def test_unplain_words_are_found_and_docstrings_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "messages.py"
    file.write_text(
        '"""It was told."""\nraise ValueError(f"method={name}: unknown; there are {names}")\nprint("mend it", "the wall time of a run")\n'
        'TEXT = "a is no host"\n"""What nobody reads."""\nkey = "said"\nprint("there is no larger file", "is no larger")\n'
    )
    assert [line.split(" in ")[0] for line in unplain(file)] == [
        "messages.py:2: 'there are {'",
        "messages.py:3: 'mend'",
        "messages.py:4: 'is no '",
    ]


def test_laws_name_the_tests_that_only_make_test_all_runs() -> None:
    """Behind the name of a slow test stands (slow), behind no other; a test of which some cases are slow counts as one that is not."""
    slow: dict[str, bool] = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(file.read_text())
        whole = any(
            isinstance(node, ast.Assign) and "pytestmark" in (text := ast.unparse(node)) and "mark.slow" in text
            for node in tree.body
        )
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                slow[node.name] = whole or any(ast.unparse(mark).startswith("pytest.mark.slow") for mark in node.decorator_list)
    named = re.findall(r"`(test_\w+)`( \(slow\))?", (ROOT / "docs" / "laws.md").read_text())
    assert not [name for name, mark in named if name in slow and slow[name] != bool(mark)]
