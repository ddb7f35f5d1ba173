"""Stop real training runs at random moments; each must end with the bits of a run left alone.

    python tests/faults.py [--seed 0] [--only align]      # `make test-faults`: about 7 minutes

Each configuration is run once in peace, and once stopped thirteen times, by the same command: with
SIGKILL as it starts, as it tokenises, and as each kind of file is written, with SIGTERM and SIGINT,
and by a full disk. Between stops its newest checkpoint is sometimes damaged.

A line is one stop: how, the step it went on from and the last it logged, the files that it left
half written (`.part`; in making-data-*: the corpus), what was then damaged. The seed decides what
is done and about when; the machine's timing decides the rest: a stop that comes when the run has
ended is left out, and the run begins again. WRONG, and exit status 1: it went on from another step
than its newest undamaged checkpoint's, ended with other bits, lost log lines, or left with another
exit status or more words than it should. Files left behind are named, no fault.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"
CONFIGURATIONS = {  # dict has dropout, whose random numbers must go on too
    "align": "--objective align --keep-every 90",
    "xlm in slices": "--objective xlm --accumulate 2",
    "dict, dropout": "--objective dict --dropout 0.1",
}
STEPS, SAVE_EVERY = 400, 7  # many checkpoints, few of them at a step that is logged anyway
SIZES = (
    "--device cpu --threads 1 --sentences 1500 --vocab-size 2000 --layers 2 --width 64 --heads 4 "
    f"--feed-forward 128 --positions 32 --tune-length 32 --batch 16 --warmup 20 --steps {STEPS} "
    f"--save-every {SAVE_EVERY}"
)
HALF = r".*\.part|making-.*"  # files that have not got their name yet
ALIKE = ".bin", "tokenizer.model", ".safetensors", "config.json"  # ends of names of such files
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
FILES = {  # a stop comes as such a file appears
    "tokenise": "making-data.*", "settings": "run/settings.*", "save": "run/checkpoint.*part",
    "model": "run/model/.*part",
}  # fmt: skip
BEFORE = "start", "tokenise", "settings"  # then these, in random order, and last the model
DURING = ("save",) * 4 + ("run", "run", *SIGNALS, "full disk")


class Run:
    """A folder of a run, and the same command again and again."""

    def __init__(self, root: Path, options: str):
        self.root, self.folder, self.errors = root, root / "run", root / "errors.txt"
        self.command = [sys.executable, TRAIN, self.folder, *options.split(), *SIZES.split()]
        root.mkdir()
        self.damaged: dict[Path, bytes] = {}  # checkpoints as they were left

    def start(self) -> subprocess.Popen:
        with open(self.errors, "wb") as file:
            return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=file)

    def files(self, pattern: str = ".*") -> dict[str, int]:
        """The files below the root with such names, and when each was last written."""
        found = {}
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    if re.fullmatch(pattern, name := str(path.relative_to(self.root))):
                        found[name] = path.stat().st_mtime_ns
        return found

    def step(self) -> int:
        """The last one in the log."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max([json.loads(line)["step"] for line in lines if line.endswith("\n")], default=0)

    def checkpoints(self) -> list[Path]:
        """The undamaged ones, the newest last."""
        paths = sorted(self.folder.glob("checkpoint-*.safetensors"))
        return [path for path in paths if self.damaged.get(path) != path.read_bytes()]

    def damage(self, rng: random.Random) -> str:
        """Flip a byte of the newest checkpoint or cut it, if there is another one."""
        if len(good := self.checkpoints()) < 2:
            return ""
        content = bytearray(good[-1].read_bytes())
        if flip := rng.random() < 0.5:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]
        good[-1].write_bytes(content)
        self.damaged[good[-1]] = bytes(content)
        return f"; then {good[-1].stem} was {'changed' if flip else 'cut'}"


def sleep_until(process: subprocess.Popen, condition, pause: float) -> None:
    """Or until it ends by itself."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(pause)


def stop(run: Run, how: str, after: float, rng: random.Random) -> int:
    """Start the run and stop it at such a moment, after that step; returns the exit status."""
    before, process = run.files(), run.start()
    try:
        if how in DURING:
            sleep_until(process, lambda: run.step() >= after, pause=0.01)
        if how == "start":
            time.sleep(3 * rng.random())
        elif how in FILES:
            if how != "save":
                time.sleep(1)  # in which a start only imports
            pause, pattern = 0.0002, FILES[how]  # less than writing a file takes
            sleep_until(process, lambda: run.files(pattern).items() - before.items(), pause)
            time.sleep((0.5 if how == "tokenise" else rng.choice((0, 0.002))) * rng.random())
        elif how == "full disk":  # for this process
            limit = run.checkpoints()[-1].stat().st_size // 2 if run.checkpoints() else 10_000
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            process.wait(120)
        else:
            time.sleep(0.1 * rng.random())
        process.send_signal(SIGNALS.get(how, signal.SIGKILL))
        return process.wait(120)
    finally:
        process.kill()


def faults_of(run: Run, how: str, status: int, good: list[Path], bad: list[Path]) -> list[str]:
    """What the stopped process did wrong; as it started there were these checkpoints."""
    text, n = run.errors.read_text(), SIGNALS.get(how, signal.SIGKILL)
    started = re.search(rf"(\d+)/{STEPS} \[", text)  # of the progress bar, as it appears
    lines = [line for line in re.split(r"[\r\n]+", text) if line and not re.search(r" \[\d", line)]
    named = [line for line in lines if "damaged" in line]
    others = [line for line in lines if line not in named]
    expected, found = step_of(good), []
    if started and int(started[1]) != expected:
        found.append(f"went on from step {started[1]}, not {expected}")
    if started and len(named) != sum(path > max(good, default=path.parent) for path in bad):
        found.append(f"of the damaged {[path.name for path in bad]} it says {named}")
    if how == "full disk":
        right = status == 2 and len(others) == 1 and "checkpoint-" in others[0]
    elif how in SIGNALS and started:
        right = status == 128 + n and not others and step_of(run.checkpoints()) == run.step()
    else:  # before the first step Python's own way out of a signal is good enough
        right = status in (-n, 128 + n) and (not others or how in SIGNALS)
    return found if right else [*found, f"exit status {status}: {others}"]


def step_of(checkpoints: list[Path]) -> int:
    """The newest one's."""
    return int(checkpoints[-1].stem.partition("-")[2]) if checkpoints else 0


def ended(run: Run, peace: Run) -> list[str]:
    """Files that are not as they should be when both have ended."""
    unlike = [
        name for name in peace.files() if name.endswith(ALIKE)
        and not ((run.root / name).exists()
                 and (run.root / name).read_bytes() == (peace.root / name).read_bytes())
    ]  # fmt: skip
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    multiples = {n for n in range(1, STEPS + 1) if not n % 20 or not n % SAVE_EVERY}
    right = steps == sorted(set(steps)) and multiples.issubset(steps) and steps[-1] == STEPS
    return unlike if right else [*unlike, "run/log.jsonl"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout.reconfigure(line_buffering=True)
    began = time.monotonic()
    wrong, stops, damages, struck = [], 0, 0, Counter()
    print(f"seed {args.seed}, {STEPS} steps, a checkpoint every {SAVE_EVERY}")
    for name in args.only:
        rng = random.Random(f"{args.seed} {name}")
        with tempfile.TemporaryDirectory() as folder:
            run, peace = (Run(Path(folder, x), CONFIGURATIONS[name]) for x in ("faults", "peace"))
            assert peace.start().wait() == 0, peace.errors.read_text()
            during = rng.sample(DURING, len(DURING))
            for number, how in enumerate((*BEFORE, *during, "model"), start=1):
                clock, before = time.monotonic(), run.files(HALF).items()
                good = run.checkpoints()
                bad = [p for p in run.folder.glob("checkpoint-*.safetensors") if p not in good]
                after = STEPS * (number - len(BEFORE) - rng.random()) / (1 + len(DURING))
                status = stop(run, how, after, rng)
                if status == 0:  # a busy machine: nothing was stopped
                    print(f"{name:13} {number:2} {how:9} came too late: from the beginning again")
                    shutil.rmtree(run.root)
                    run.root.mkdir()
                    continue
                half = [path for path, _ in run.files(HALF).items() - before]
                faults = faults_of(run, how, status, good, bad)
                struck.update({re.match(r"(run/)?[a-z]+", path)[0] for path in half})
                step, damage = run.step(), ""
                if how in DURING and rng.random() < 0.4:
                    damage = run.damage(rng)
                wrong, stops, damages = wrong + faults, stops + 1, damages + bool(damage)
                line = f"{name:13} {number:2} {how:9} status {status:3}, step {step_of(good):3} to "
                line += f"{step:3}, {time.monotonic() - clock:4.1f} s, half written: "
                print(line + (", ".join(half) or "nothing") + damage)
                for fault in faults:
                    print(f"  WRONG: {fault}")
            if run.start().wait() != 0:
                wrong.append("the last run failed")
                print(f"  WRONG: {run.errors.read_text()}")
            unlike = ended(run, peace)
            wrong += unlike
            left = ", ".join(sorted(run.files().keys() - peace.files().keys())) or "nothing"
            verdict = f"WRONG: {', '.join(unlike)}" if unlike else "the same bits"
            print(f"{name:13} ended: {verdict}; left behind: {left}")
    parts = ", ".join(f"{kind} {times}" for kind, times in sorted(struck.items())) or "nothing"
    print(
        f"{'FAILED' if wrong else 'passed'}: {len(wrong)} faults in {stops} stops and {damages} "
        f"damaged checkpoints; stopped while being written: {parts}; "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
