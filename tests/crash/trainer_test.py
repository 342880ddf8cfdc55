"""The example trainer, killed in the middle of a save, ends where an uninterrupted run ends.

usage: trainer_test.py PATH_TO_STRANDLINE_TRAINER
"""

import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import unittest

TRAINER = sys.argv.pop() if len(sys.argv) > 1 else ""

STEPS = 20
SAVE_EVERY = 2
# 8 MB of weights and momentum: writing them takes long enough to be killed in the middle of it.
FEATURES = 1_000_000
# A kill lands when the machine lets it; nearly every one hits a save. Without any hit in so many,
# saves are not written in the background any more.
KILLS_MAX = 20


def command(directory, *options):
    return [TRAINER, str(directory), *map(str, options)]


def training(directory):
    return command(directory, "--steps", STEPS, "--save-every", SAVE_EVERY, "--features", FEATURES)


def run(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def losses(lines):
    """The loss of each step, to the last bit, as it was printed."""
    found = (re.fullmatch(r"step (\d+) loss (\S+)", line) for line in lines)
    return {int(match[1]): match[2] for match in found if match}


def run_and_kill(directory, saves):
    """Trains until so many saves were begun, then kills at once; returns the lines printed."""
    lines = []
    with subprocess.Popen(training(directory), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("saving step"):
                saves -= 1
            if saves == 0:
                process.send_signal(signal.SIGKILL)
                break
        lines += process.stdout.read().splitlines()
    return lines


def committed(directory):
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


class TrainerTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.directory = pathlib.Path(self.folder.name) / "checkpoints"

    def test_killed_in_a_save_and_resumed_equals_uninterrupted_bit_for_bit(self):
        whole = run(training(pathlib.Path(self.folder.name) / "uninterrupted"))
        self.assertEqual(whole.returncode, 0, whole.stderr)
        expected = losses(whole.stdout.splitlines())
        self.assertEqual(sorted(expected), list(range(1, STEPS + 1)))
        self.assertGreater(len(set(expected.values())), STEPS // 2, "the loss does not move")

        was_hit = False
        for _ in range(KILLS_MAX):
            before = committed(self.directory)
            lines = run_and_kill(self.directory, saves=3)
            self.assert_part_of(expected, lines)
            if before:
                self.assertEqual(lines[0], f"restored step {before[-1]}")
            in_a_save = any(self.directory.glob(".step-*.partial-*"))
            if in_a_save and committed(self.directory):
                was_hit = True
                break
            if max(committed(self.directory), default=0) > STEPS - 4 * SAVE_EVERY:
                self.remove_checkpoints()
        self.assertTrue(was_hit, f"none of {KILLS_MAX} kills hit a save")

        newest = committed(self.directory)[-1]
        resumed = run(training(self.directory))
        self.assertEqual(resumed.returncode, 0, resumed.stderr)
        lines = resumed.stdout.splitlines()
        self.assertEqual(lines[0], f"restored step {newest}")
        self.assertEqual(sorted(losses(lines)), list(range(newest + 1, STEPS + 1)))
        self.assert_part_of(expected, lines)
        self.assertEqual(committed(self.directory)[-1], STEPS)
        leftovers = list(self.directory.glob(".step-*"))
        self.assertEqual(leftovers, [], "the resumed run sweeps what the dead one left")

    def test_a_finished_run_has_nothing_left_to_train(self):
        small = command(self.directory, "--steps", 4, "--save-every", 2)
        self.assertEqual(run(small).returncode, 0)
        again = run(small)
        self.assertEqual((again.returncode, again.stdout), (0, "restored step 4\n"))

    def test_another_size_is_refused_by_name(self):
        self.assertEqual(run(command(self.directory, "--features", 64)).returncode, 0)
        other = run(command(self.directory, "--features", 65))
        self.assertEqual(other.returncode, 1)
        self.assertIn("model.weights", other.stderr)
        self.assertEqual(other.stdout, "")

    def test_wrong_usage_is_told(self):
        for arguments in (
            [],
            ["--steps"],
            [self.directory, "--steps"],
            [self.directory, "--steps", "ten"],
            [self.directory, "--steps", 0],
            [self.directory, "--colour", 1],
        ):
            result = run([TRAINER, *map(str, arguments)])
            self.assertEqual(result.returncode, 2, arguments)
            self.assertIn("usage:", result.stderr)

    def assert_part_of(self, expected, lines):
        for step, loss in losses(lines).items():
            self.assertEqual(loss, expected[step], f"step {step}")

    def remove_checkpoints(self):
        for path in self.directory.glob("step-*"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


if __name__ == "__main__":
    unittest.main()
