#!/usr/bin/env python3
"""Checks the rules of the house that no compiler checks; see CONTRIBUTING.md for the rules.

    tools/tidy.py [ROOT]

Prints `path:line: problem` for each problem and exits with 1 if there is one. Reads the files that
git knows, or, in an unpacked archive, all that are there. Needs nothing but Python.

Each rule is a function from the tree to its problems. tidy_test.py plants a violation of each, so
that no rule can go blind unnoticed. C++ is read by blanking comments and literals and then matching
braces: enough for code in one format, and far quicker than a compiler.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

LINE_COLUMNS_MAX = 100
FILE_LINES_MAX = 800
FUNCTION_LINES_MAX = 70
PUBLIC_LINES_MAX = 1500
CMAKE_OPTIONS_MAX = 5

# What each room of src/ may include besides itself, include/ and what its own rooms may include.
ROOMS_BELOW: dict[str, tuple[str, ...]] = {
    "base": (),
    "state": ("base",),
    "format": ("state",),
    "memory": ("state",),
    "storage": ("state",),
    "device": ("state",),
    "staging": ("format", "memory", "device"),
    "checkpoint": ("staging", "storage", "format"),
    "testing": ("checkpoint",),
}

# These see the public headers only.
OUTSIDE = ("include/", "cli/", "examples/", "python/", "tests/packaging/")

SKIPPED_FOLDERS = {"build", "dist", ".git", ".venv", "__pycache__", "node_modules"}

# In pieces, so that this file does not hold what it looks for.
LEFTOVER = re.compile(
    r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")) + r")\b"
)
MACHINE_PATH = re.compile(
    r"(?<![\w.$}~*-])/(?:" + "|".join(("work", "root", "home", "farm")) + r")/\w"
)
PACKAGE_INDEX = re.compile("|".join(("index" + "-url", "find" + "-links", r"registry[ =:]+http")))
SLEEP = re.compile(r"\b(?:sleep_for|sleep_until|(?:u|nano|clock_nano)?sleep)\s*\(")
FORBIDDEN_CALL = re.compile(
    r"std::(?:cout|cerr|clog)\b|(?<![\w.>:])(?:std::|::)?"
    r"(?:v?f?printf|f?puts|perror|(?:secure_)?getenv|_?exit|_Exit|quick_exit|abort|terminate)"
    r"(?=\s*\()"
)
# What stands before a name that is being declared: a type.
TYPE_BEFORE = re.compile(r"(?:[>&*]|\b(?!(?:return|else|do)\b)\w+)\s+$")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
GTEST_INCLUDE = re.compile(r"^\s*#\s*include\s+<(?:gtest|gmock|rapidcheck)/?", re.MULTILINE)

LITERAL_OR_COMMENT = re.compile(
    r"//[^\n]*"
    r"|/\*.*?\*/"
    r'|\bu?8?R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'",
    re.DOTALL,
)
PREPROCESSOR = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Problem:
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


class File:
    """One file of the tree: its path from the root, its text, and views of it."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text

    @property
    def is_cpp(self) -> bool:
        return self.path.endswith((".cc", ".h"))

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    @property
    def is_script(self) -> bool:
        return self.text.startswith("#!") or self.path.endswith((".sh", ".cmake", "CMakeLists.txt"))

    @property
    def is_test(self) -> bool:
        return self.path.endswith("_test.cc") or self.path.startswith(
            ("tests/", "src/testing/", "python/tests/")
        )

    @property
    def room(self) -> str | None:
        parts = self.path.split("/")
        return parts[1] if parts[0] == "src" and len(parts) > 2 else None

    @functools.cached_property
    def code(self) -> str:
        """C++ with comments, literals and preprocessor lines blanked; lines stay where they are."""
        return PREPROCESSOR.sub(blank, LITERAL_OR_COMMENT.sub(blank, self.text))

    def line_of(self, offset: int) -> int:
        return self.text.count("\n", 0, offset) + 1

    def find(self, pattern: re.Pattern[str], text: str | None = None) -> Iterator[tuple[int, str]]:
        """The line and the text of each match."""
        for match in pattern.finditer(self.text if text is None else text):
            yield self.line_of(match.start()), match.group()


class Tree:
    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.files: dict[str, File] = {}
        for path in sorted(paths_under(root)):
            try:
                text = (root / path).read_text(encoding="utf-8")
            except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
                continue  # binary, or deleted but not yet committed
            self.files[path] = File(path, text)

    def cpp(self) -> Iterator[File]:
        return (file for file in self.files.values() if file.is_cpp)

    def python(self) -> Iterator[File]:
        return (file for file in self.files.values() if file.is_python)


def paths_under(root: pathlib.Path) -> list[str]:
    """What git knows or would add; in a folder that is no repository of its own, all there is."""
    git = ["git", "-C", str(root)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode == 0 and pathlib.Path(top.stdout.strip()).resolve() == root.resolve():
            listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
            names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
            return [name for name in names.split("\0") if name]
    except FileNotFoundError:
        pass  # no git here
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [(pathlib.Path(folder) / name).relative_to(root).as_posix() for name in names]
    return paths


# ---- Layers ----


def rooms_seen_by(room: str) -> set[str]:
    seen = {room}
    for below in ROOMS_BELOW[room]:
        seen |= rooms_seen_by(below)
    return seen


def check_layers(tree: Tree) -> Iterator[Problem]:
    for file in tree.cpp():
        if file.room is not None and file.room not in ROOMS_BELOW:
            yield Problem(file.path, 1, f"room '{file.room}' is not in ROOMS_BELOW of tidy.py")
            continue
        if file.path.endswith("_test.cc"):
            continue  # Tests see everything.
        for match in INCLUDE.finditer(file.text):
            problem = include_problem(tree, file, match.group(1))
            if problem:
                yield Problem(file.path, file.line_of(match.start(1)), problem)


def include_problem(tree: Tree, file: File, included: str) -> str | None:
    if included.startswith("strandline/"):
        return None
    target = included.split("/")[0]
    if file.room is not None:
        if target in ROOMS_BELOW and target not in rooms_seen_by(file.room):
            return f"'{file.room}' must not see '{target}': includes point downwards only"
        if target not in ROOMS_BELOW:
            return f'"{included}" is no header of a room: write "room/name.h" or <name.h>'
        return None
    beside = (pathlib.PurePosixPath(file.path).parent / included).as_posix()
    if file.path.startswith(OUTSIDE) and beside not in tree.files:
        return f'"{included}" is internal: only include/strandline is seen from here'
    return None


# ---- Sizes ----


def check_line_lengths(tree: Tree) -> Iterator[Problem]:
    for file in tree.files.values():
        if not (file.is_cpp or file.is_python or file.is_script):
            continue
        for number, line in enumerate(file.text.splitlines(), 1):
            if len(line) > LINE_COLUMNS_MAX:
                yield Problem(file.path, number, f"{len(line)} columns; at most {LINE_COLUMNS_MAX}")


def check_file_lengths(tree: Tree) -> Iterator[Problem]:
    for file in tree.files.values():
        lines = file.text.count("\n")
        if (file.is_cpp or file.is_python) and lines > FILE_LINES_MAX:
            yield Problem(file.path, lines, f"{lines} lines; at most {FILE_LINES_MAX} a file")


def check_function_lengths(tree: Tree) -> Iterator[Problem]:
    for file in tree.files.values():
        if file.is_cpp:
            spans = cpp_functions(file.code)
        elif file.is_python:
            spans = python_functions(file)
        else:
            continue
        for first, last in spans:
            if last - first + 1 > FUNCTION_LINES_MAX:
                yield Problem(
                    file.path,
                    first,
                    f"function of {last - first + 1} lines; at most {FUNCTION_LINES_MAX}",
                )


def python_functions(file: File) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse(file.text, file.path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.end_lineno or node.lineno


SCOPE = re.compile(r"\b(?:namespace|class|struct|union|enum|extern)\b")
MEMBER_INIT = re.compile(r"\)[^;{}]*(?<!:):(?!:).*[\w>]\s*$", re.DOTALL)


def cpp_functions(code: str) -> Iterator[tuple[int, int]]:
    """First and last line of each function that is not inside another one."""
    position, head = 0, 0  # `head`: where the declaration that is being read begins
    while position < len(code):
        character = code[position]
        if character == "{":
            text = code[head:position]
            if is_scope(text):
                head = position + 1  # Go inside.
            else:
                end = matching_brace(code, position)
                if MEMBER_INIT.search(text):
                    position = end + 1  # `: member_{value}` of a constructor; its body follows.
                    continue
                if "(" in text:
                    begin = head + len(text) - len(text.lstrip())
                    yield code.count("\n", 0, begin) + 1, code.count("\n", 0, end) + 1
                    head = end + 1
                position = end
        elif character in ";}":
            head = position + 1
        position += 1


def is_scope(head: str) -> bool:
    """Whether the brace after `head` opens a namespace or a type, not a function or a value."""
    head = re.sub(r"\btemplate\s*<[^{}]*?>\s*(?=\b(?:class|struct|union)\b)", "", head)
    found = SCOPE.search(head)
    if found is None:
        return False
    before = head[: found.start()]
    # `struct Foo make(…) {` and `void f(struct Foo foo) {` are functions.
    if "(" in before or "=" in before:
        return False
    after = re.sub(
        r"\b(?:alignas|[A-Z][A-Z_]+)\s*(\((?:[^()]|\([^()]*\))*\))", "", head[found.end() :]
    )
    return "(" not in after


def matching_brace(code: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(code, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    return len(code) - 1


def check_public_size(tree: Tree) -> Iterator[Problem]:
    lines = sum(f.text.count("\n") for f in tree.cpp() if f.path.startswith("include/"))
    if lines > PUBLIC_LINES_MAX:
        yield Problem("include", 1, f"{lines} lines of public headers; at most {PUBLIC_LINES_MAX}")


def check_cmake_options(tree: Tree) -> Iterator[Problem]:
    file = tree.files.get("CMakeLists.txt")
    options = list(file.find(re.compile(r"^option\(", re.MULTILINE))) if file else []
    if file and len(options) > CMAKE_OPTIONS_MAX:
        yield Problem(
            file.path, options[-1][0], f"{len(options)} options; at most {CMAKE_OPTIONS_MAX}"
        )


# ---- Contents ----


def check_leftovers(tree: Tree) -> Iterator[Problem]:
    for file in tree.files.values():
        for line, found in file.find(LEFTOVER):
            yield Problem(file.path, line, f"'{found}': do it, or open an issue and take it out")


def check_sleeps(tree: Tree) -> Iterator[Problem]:
    for file in tree.files.values():
        if file.is_test and (file.is_cpp or file.is_python):
            text = file.code if file.is_cpp else re.sub(r"#.*", "", file.text)
            for line, _ in file.find(SLEEP, text):
                yield Problem(file.path, line, "a test that sleeps: prove the order instead")


def check_library_calls(tree: Tree) -> Iterator[Problem]:
    for file in tree.cpp():
        if file.room is None or file.is_test or file.path.endswith("_fuzz.cc"):
            continue
        for match in FORBIDDEN_CALL.finditer(file.code):
            # A method of such a name may be declared: `Status abort();`.
            if not TYPE_BEFORE.search(file.code, max(0, match.start() - 80), match.start()):
                yield Problem(
                    file.path,
                    file.line_of(match.start()),
                    f"'{match.group()}': the library never prints, exits or reads the environment",
                )


TORCH_FOLDER = "python/strandline/torch/"


def check_torch_imports(tree: Tree) -> Iterator[Problem]:
    for file in tree.python():
        if not file.path.startswith("python/strandline/") or file.path.startswith(TORCH_FOLDER):
            continue
        for node in ast.walk(ast.parse(file.text, file.path)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if any(name.split(".")[0] == "torch" for name in names):
                yield Problem(file.path, node.lineno, f"only {TORCH_FOLDER} may import torch")


def check_tests_are_built(tree: Tree) -> Iterator[Problem]:
    """CMake compiles src/**/*_test.cc and tests/**/*_test.cc: a test elsewhere would never run."""
    for file in tree.cpp():
        if file.path.endswith("_test.cc"):
            if not file.path.startswith(("src/", "tests/")):
                yield Problem(file.path, 1, "CMakeLists.txt takes tests from src/ and tests/ only")
        elif (
            file.path.endswith(".cc")
            and not file.path.startswith("src/testing/")
            and GTEST_INCLUDE.search(file.text)
        ):
            yield Problem(file.path, 1, "a test that is not named *_test.cc is not built")


def check_pragma_once(tree: Tree) -> Iterator[Problem]:
    for file in tree.cpp():
        if file.path.endswith(".h") and not re.search(r"^#pragma once$", file.text, re.MULTILINE):
            yield Problem(file.path, 1, "a header without #pragma once")


def check_traces(tree: Tree) -> Iterator[Problem]:
    for file in tree.files.values():
        if file.path == "LICENSE":
            continue
        for line, found in file.find(MACHINE_PATH):
            yield Problem(file.path, line, f"'{found}…' is a path of one machine")
        for line, found in file.find(PACKAGE_INDEX):
            yield Problem(file.path, line, f"'{found}': where packages come from is the user's")


def check_changelog(tree: Tree) -> Iterator[Problem]:
    file = tree.files.get("CHANGELOG.md")
    version = tree.files.get("include/strandline/version.h")
    number = re.search(r'kVersion = "([^"]+)"', version.text) if version else None
    if file is None:
        yield Problem("CHANGELOG.md", 1, "is missing")
    elif number and f"[{number.group(1)}]" not in file.text:
        yield Problem(file.path, 1, f"has no section for version {number.group(1)}")


CITED_TEST = re.compile(r"`((?:[A-Z]\w+\.[A-Z]\w+|test_\w+))`")
CPP_TEST = re.compile(r"\bTEST(?:_F|_P)?\(\s*(\w+)\s*,\s*(\w+)\s*\)")
CMAKE_TEST = re.compile(r"add_test\(\s*NAME\s+([\w.]+)")


def names_of_tests(tree: Tree) -> set[str]:
    names: set[str] = set()
    for file in tree.files.values():
        if file.is_cpp:
            names.update(".".join(found.groups()) for found in CPP_TEST.finditer(file.text))
        elif file.is_python:
            names.update(re.findall(r"^ *def (test_\w+)", file.text, re.MULTILINE))
        elif file.path.endswith("tests.cmake"):
            names.update(CMAKE_TEST.findall(file.text))
    return names


def check_cited_tests(tree: Tree) -> Iterator[Problem]:
    """A promise is only as good as the test that it names."""
    file = tree.files.get("docs/guarantees.md")
    if file is None:
        return
    names = names_of_tests(tree)
    for found in CITED_TEST.finditer(file.text):
        if found.group(1) not in names:
            yield Problem(
                file.path, file.line_of(found.start()), f"no test is called {found.group(1)}"
            )


RULES: tuple[Callable[[Tree], Iterator[Problem]], ...] = (
    check_layers,
    check_line_lengths,
    check_file_lengths,
    check_function_lengths,
    check_public_size,
    check_cmake_options,
    check_leftovers,
    check_sleeps,
    check_library_calls,
    check_torch_imports,
    check_tests_are_built,
    check_pragma_once,
    check_traces,
    check_changelog,
    check_cited_tests,
)


def problems_of(root: pathlib.Path) -> tuple[int, list[Problem]]:
    """How many files were read, and what is wrong with them."""
    tree = Tree(root)
    return len(tree.files), [problem for rule in RULES for problem in rule(tree)]


def main(arguments: list[str]) -> int:
    root = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).parents[1]
    count, problems = problems_of(root)
    for problem in problems:
        print(problem)
    if count == 0:
        print(f"tidy: no file found in {root}")
        return 1
    print(f"tidy: {count} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
