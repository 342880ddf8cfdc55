#!/usr/bin/env python3
"""Compiles the C++ example of README.md as it is written.

readme_test.py SOURCE COMPILER [FLAG…]
"""

import pathlib
import re
import subprocess
import sys

# What the example takes for granted.
BEFORE = """
#include <chrono>
#include <cstdint>
#include <vector>
using namespace std::chrono_literals;
int report(const strandline::Error& error);
int example(std::vector<float>& weights, std::int64_t epoch, std::int64_t step);
int example(std::vector<float>& weights, std::int64_t epoch, std::int64_t step) {
"""
AFTER = """
  return 0;
}
"""


def main() -> int:
    source, compiler, *flags = sys.argv[1:]
    text = pathlib.Path(source, "README.md").read_text("utf-8")
    (code,) = re.findall(r"^```cpp\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    includes = [line for line in code.splitlines() if line.startswith("#include")]
    body = [line for line in code.splitlines() if not line.startswith("#include")]
    program = "\n".join([*includes, BEFORE, *body, AFTER])
    command = [compiler, "-std=c++20", "-fsyntax-only", *flags, f"-I{source}/include"]
    return subprocess.run(
        [*command, "-x", "c++", "-"], input=program, text=True, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
