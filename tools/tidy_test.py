#!/usr/bin/env python3
"""Plants a violation of each rule of tidy.py and checks that it is found, and found alone."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tidy

CLEAN = {
    "CHANGELOG.md": "## [0.1.0] - Unreleased\n",
    "include/strandline/version.h": '#pragma once\nconst char* kVersion = "0.1.0";\n',
}


class TidyTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="tidy ")
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)

    def write(self, files: dict[str, str | bytes]) -> None:
        for path, content in files.items():
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.encode())

    def problems(self, files: dict[str, str | bytes]) -> list[str]:
        self.write({**CLEAN, **files})
        return [str(problem) for problem in tidy.problems_of(self.root)[1]]

    def assert_found(self, expected: str, files: dict[str, str | bytes]) -> None:
        problems = self.problems(files)
        self.assertEqual(len(problems), 1, problems)
        self.assertIn(expected, problems[0])

    def assert_clean(self, files: dict[str, str | bytes]) -> None:
        self.assertEqual(self.problems(files), [])


class LayersTest(TidyTest):
    def test_a_room_must_not_see_a_room_above_it(self) -> None:
        self.assert_found(
            "src/base/clock.h:2: 'base' must not see 'state'",
            {"src/base/clock.h": '#pragma once\n#include "state/keys.h"\n'},
        )

    def test_neighbours_must_not_see_each_other(self) -> None:
        neighbours = ("format", "memory", "storage", "device")
        for room in neighbours:
            for other in neighbours:
                if room != other:
                    with self.subTest(room=room, other=other):
                        self.assert_found(
                            f"src/{room}/a.cc:1: '{room}' must not see '{other}'",
                            {f"src/{room}/a.cc": f'#include "{other}/b.h"\n'},
                        )
                        (self.root / f"src/{room}/a.cc").unlink()

    def test_staging_must_not_see_storage(self) -> None:
        self.assert_found("'staging'", {"src/staging/a.cc": '#include "storage/posix.h"\n'})

    def test_only_tests_see_the_test_doubles(self) -> None:
        double = '#include "testing/fake_device.h"\n'
        self.assert_found("must not see 'testing'", {"src/staging/a.cc": double})
        (self.root / "src/staging/a.cc").unlink()
        self.assert_clean({"src/staging/a_test.cc": double, "tests/crash/b_test.cc": double})

    def test_a_room_sees_all_that_is_below_it(self) -> None:
        below = ("base", "state", "format", "memory", "device", "staging", "storage", "checkpoint")
        includes = "".join(f'#include "{room}/a.h"\n' for room in below)
        self.assert_clean(
            {"src/checkpoint/a.cc": includes, "src/base/a.cc": '#include "strandline/error.h"\n'}
        )

    def test_outsiders_see_public_headers_only(self) -> None:
        for folder in (
            "cli",
            "python/bindings",
            "examples",
            "tests/packaging",
            "include/strandline",
        ):
            with self.subTest(folder=folder):
                self.assert_found(
                    "is internal", {f"{folder}/main.cc": '#include "format/manifest.h"\n'}
                )
                (self.root / folder / "main.cc").unlink()

    def test_outsiders_see_their_own_headers(self) -> None:
        self.assert_clean({"cli/main.cc": '#include "table.h"\n', "cli/table.h": "#pragma once\n"})

    def test_a_new_room_must_be_given_its_place(self) -> None:
        self.assert_found("'utils' is not in", {"src/utils/a.cc": ""})

    def test_a_header_is_named_with_its_room(self) -> None:
        self.assert_found("is no header of a room", {"src/base/a.cc": '#include "clock.h"\n'})


class SizesTest(TidyTest):
    def test_long_lines(self) -> None:
        line = "/" * 101 + "\n"
        self.assert_found("src/base/a.cc:1: 101 columns", {"src/base/a.cc": line})

    def test_columns_are_characters_and_not_bytes(self) -> None:
        self.assert_clean({"src/base/a.cc": "//" + "é" * 98 + "\n"})

    def test_long_lines_of_scripts(self) -> None:
        self.assert_found("scripts/x:2", {"scripts/x": "#!/bin/sh\n#" + "x" * 100 + "\n"})

    def test_long_files(self) -> None:
        self.assert_clean({"src/base/a.cc": "\n" * 800})
        self.assert_found("801 lines", {"src/base/a.cc": "\n" * 801})

    def test_public_headers_that_grow(self) -> None:
        header = "#pragma once\n" + "\n" * 790
        self.assert_found(
            "of public headers",
            {"include/strandline/a.h": header, "include/strandline/b.h": header},
        )

    def test_too_many_options(self) -> None:
        self.assert_found("6 options", {"CMakeLists.txt": "option(A)\n" * 6})

    def test_long_python_functions(self) -> None:
        self.assert_clean({"tools/a.py": "def f():\n" + "    pass\n" * 69})
        self.assert_found(
            "tools/a.py:1: function of 71", {"tools/a.py": "def f():\n" + "    pass\n" * 70}
        )


class CppFunctionsTest(TidyTest):
    def spans(self, text: str) -> list[tuple[int, int]]:
        return list(tidy.cpp_functions(tidy.File("a.cc", text).code))

    def test_long_functions(self) -> None:
        body = "  call();\n" * 69
        self.assert_found(
            "src/base/a.cc:3: function of 71 lines",
            {"src/base/a.cc": f"namespace a {{\n\nint f(int x) {{\n{body}}}\n}}\n"},
        )

    def test_functions_of_the_maximal_length(self) -> None:
        body = "  call();\n" * 68
        self.assert_clean({"src/base/a.cc": f"int f(int x) {{\n{body}}}\n"})

    def test_methods_inside_types(self) -> None:
        text = (
            "class ATTRIBUTE(capability(x)) A final : public B {\n"
            "  int f() const {\n  }\n  int x{3};\n};\n"
        )
        self.assertEqual(self.spans(text), [(2, 3)])

    def test_templates_of_types_and_of_functions(self) -> None:
        text = "template <class T>\nstruct A {\n  void f() {}\n};\ntemplate <class T>\nT g() {\n}\n"
        self.assertEqual(self.spans(text), [(3, 3), (5, 7)])

    def test_functions_that_return_a_named_type(self) -> None:
        self.assertEqual(self.spans("struct A f(int x) {\n}\n"), [(1, 2)])

    def test_constructors_with_braced_members(self) -> None:
        text = "A::A(int x) : a_{x}, b_(x), c_{\n{1}} {\n  f();\n}\nint g() {\n}\n"
        self.assertEqual(self.spans(text), [(1, 4), (5, 6)])

    def test_values_are_no_functions(self) -> None:
        self.assertEqual(self.spans("constexpr int kTable[] = {\n1,\n2};\nint f() {}\n"), [(4, 4)])

    def test_lambdas_count_to_the_function_around_them(self) -> None:
        self.assertEqual(self.spans("void f() {\n  auto g = [] {\n  };\n}\n"), [(1, 4)])

    def test_braces_in_comments_literals_and_macros_do_not_count(self) -> None:
        text = (
            'void f() {  // }\n  g("}", \'}\', R"x(})")x", 1\'000);\n  /* } */\n}\n'
            "#define M(x) \\\n  {\nvoid h() {}\n"
        )
        self.assertEqual(self.spans(text), [(1, 4), (7, 7)])


class ContentsTest(TidyTest):
    def test_leftover_marks(self) -> None:
        for mark in ("TO" + "DO", "FIX" + "ME", "X" + "XX"):
            with self.subTest(mark=mark):
                self.assert_found(
                    f"src/base/a.cc:2: '{mark}'", {"src/base/a.cc": f"\n// {mark}: x\n"}
                )
        self.assert_clean({"src/base/a.cc": "// XXH3, a file named tmp.XXXXXX\n"})

    def test_sleeping_tests(self) -> None:
        sleeps = {
            "src/base/a_test.cc": "void f() { std::this_thread::sleep_for(1ms); }\n",
            "src/testing/b.cc": "void f() { usleep(3); }\n",
            "python/tests/test_a.py": "time.sleep(1)\n",
        }
        for path, text in sleeps.items():
            with self.subTest(path=path):
                self.assert_found("sleeps", {path: text})
                (self.root / path).unlink()
        self.assert_clean({"src/base/a_test.cc": "// It must not sleep(1) here.\n"})

    def test_a_library_that_prints_exits_or_reads_the_environment(self) -> None:
        calls = {
            "std::cout << x;": "std::cout",
            'printf("x");': "printf",
            "  std::printf();": "std::printf",
            "if (x) return getenv(name);": "getenv",
            "x = std::getenv(name);": "std::getenv",
            "{ ::exit(1); }": "::exit",
            "if (x) abort();": "abort",
            "else std::abort();": "std::abort",
        }
        for statement, name in calls.items():
            with self.subTest(statement=statement):
                self.assert_found(
                    f"src/base/a.cc:2: '{name}':",
                    {"src/base/a.cc": f"void f() {{\n{statement}\n}}\n"},
                )

    def test_methods_and_text_of_such_names_are_allowed(self) -> None:
        self.assert_clean(
            {
                "src/base/a.h": "#pragma once\nclass A {\n  Status abort();\n};\n",
                "src/base/a.cc": "Status A::abort() {\n  transfer.abort();\n  p->abort();\n"
                '  return failure("call exit(1)");  // not abort()\n  snprintf(b);\n}\n',
                "src/format/a_fuzz.cc": "void f() { abort(); }\n",
                "src/base/a_test.cc": "void f() { _exit(1); }\n",
                "cli/main.cc": "int main() { std::cout << 1; }\n",
            }
        )

    def test_torch_is_imported_in_one_place(self) -> None:
        for statement in ("import torch.nn", "from torch import nn", "def f():\n    import torch"):
            with self.subTest(statement=statement):
                self.assert_found("may import torch", {"python/strandline/a.py": statement + "\n"})
        self.assert_clean(
            {
                "python/strandline/a.py": "from . import torch\nimport strandline.torch\n",
                "python/strandline/torch/a.py": "import torch\n",
                "python/tests/test_a.py": "import torch\n",
            }
        )

    def test_tests_that_are_not_built(self) -> None:
        self.assert_found("from src/ and tests/ only", {"cli/a_test.cc": ""})
        (self.root / "cli/a_test.cc").unlink()
        self.assert_found("not named", {"src/base/test_a.cc": "#include <gtest/gtest.h>\n"})

    def test_headers_without_a_guard(self) -> None:
        self.assert_found("#pragma once", {"src/base/a.h": "// no #pragma once\n"})

    def test_paths_of_a_machine(self) -> None:
        for top in ("work", "root", "home"):
            with self.subTest(top=top):
                self.assert_found("path of one machine", {"docs/a.md": f"see `/{top}/x`\n"})
        self.assert_clean({"docs/a.md": "see ~/wo" + "rk/x, docs/home/x and a/root/b\n"})

    def test_package_indexes(self) -> None:
        self.assert_found("where packages come from", {"a.txt": "--index" + "-url x\n"})

    def test_a_missing_changelog(self) -> None:
        self.write(CLEAN)
        (self.root / "CHANGELOG.md").unlink()
        problems = tidy.problems_of(self.root)[1]
        self.assertEqual([str(problem) for problem in problems], ["CHANGELOG.md:1: is missing"])

    def test_a_changelog_without_the_version(self) -> None:
        self.assert_found("has no section for version 0.1.0", {"CHANGELOG.md": "## [0.0.9]\n"})


class CitedTestsTest(TidyTest):
    def test_a_promise_whose_test_is_gone(self) -> None:
        self.assert_found(
            "docs/guarantees.md:2: no test is called Slab.Overlaps",
            {
                "docs/guarantees.md": "`Slab.Never` `test_it` `Tree.IsTidy`\n`Slab.Overlaps`\n",
                "src/memory/slab_test.cc": "TEST(Slab, Never) {}\n",
                "python/tests/test_a.py": "def test_it():\n    assert True\n",
                "tests/tests.cmake": "add_test(NAME Tree.IsTidy\n  COMMAND true)\n",
                "CMakeLists.txt": "file(GLOB_RECURSE test_sources src/*_test.cc)\n",
            },
        )


class TreeTest(TidyTest):
    BAD = "#\tno guard\n"

    def test_binary_files_are_left_alone(self) -> None:
        self.assert_clean({"tests/golden/a.bin": b"\xff\xfe\x00/root/x"})

    def test_build_folders_are_left_alone(self) -> None:
        self.assert_clean({"build/dev/a.h": self.BAD, ".venv/a.h": self.BAD})

    def test_a_repository_is_read_as_git_sees_it(self) -> None:
        self.write({**CLEAN, ".gitignore": "/ignored/\n", "ignored/a.h": self.BAD})
        self.write({"added.h": self.BAD, "untracked.h": self.BAD})
        try:
            subprocess.run(["git", "-C", str(self.root), "init", "-q"], check=True)
        except FileNotFoundError:
            self.skipTest("git is not installed")
        subprocess.run(["git", "-C", str(self.root), "add", "added.h"], check=True)
        paths = [problem.path for problem in tidy.problems_of(self.root)[1]]
        self.assertEqual(paths, ["added.h", "untracked.h"])

    def test_an_archive_inside_another_repository_is_read_whole(self) -> None:
        subprocess.run(["git", "-C", str(self.root), "init", "-q"], check=True)
        self.write({f"inner/{path}": text for path, text in CLEAN.items()})
        self.write({"inner/a.h": self.BAD, ".gitignore": "/inner/\n"})
        problems = tidy.problems_of(self.root / "inner")[1]
        self.assertEqual([problem.path for problem in problems], ["a.h"])

    def test_an_empty_tree_is_an_error(self) -> None:
        self.assertEqual(tidy.main([str(self.root)]), 1)

    def test_every_rule_is_run(self) -> None:
        rules = {name for name in vars(tidy) if name.startswith("check_")}
        self.assertEqual({rule.__name__ for rule in tidy.RULES}, rules)


if __name__ == "__main__":
    unittest.main()
