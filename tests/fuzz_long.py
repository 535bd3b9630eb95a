"""Many random calls of the operator, each watched: ``python tests/fuzz_long.py --calls 100000 --seed 0 --json OUT``.

The calls are made in child processes; the parent notices when one dies or is silent for too long, notes the call, and
starts another child behind it. A call is its seed: ``--calls 1 --seed S`` makes it again. Exit code 1 on any failure.
``--seconds`` bounds the time as well; ``KTLIB_TEST_EXTENSION`` names another build of the extension (extension.py).
"""

import argparse
import collections
import datetime
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def child(arguments):
    """Make the calls of this job, one line before and one after each."""
    from support import (
        extension,  # noqa: F401  before ktlib is imported
        fuzz,
    )

    for seed in range(arguments.first, arguments.seed + arguments.calls, arguments.jobs):
        if time.monotonic() > arguments.until:
            return
        print("begin", seed, flush=True)
        if seed == arguments.hang:
            time.sleep(3600)
        if seed == arguments.crash:
            os.abort()
        try:
            print("end", json.dumps({"kind": fuzz.try_one(fuzz.Seeded(seed))}), flush=True)
        except Exception as error:
            print("end", json.dumps({"what": f"{type(error).__name__}: {error}"[:2000]}), flush=True)


class Job:
    """One chain of children."""

    def __init__(self, first, until):
        self.current, self.heard, self.rest = None, time.monotonic(), b""
        command = [sys.executable, "-W", "ignore", __file__, "--child", "--first", str(first), "--until", str(until)]
        command += sys.argv[1:]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def lines(self):
        """What it has written since, as whole lines; None at its end."""
        self.heard, text = time.monotonic(), os.read(self.process.stdout.fileno(), 65536)
        *lines, self.rest = (self.rest + text).split(b"\n")
        return [line.decode() for line in lines] if text else None


def main():
    """Run, print progress, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no call after this many")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next has the next")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="child processes at a time")
    parser.add_argument("--patience", type=float, default=60, help="seconds until a silent call counts as hanging")
    parser.add_argument("--hang", type=int, help="let the call of this seed hang, to try the watchdog")
    parser.add_argument("--crash", type=int, help="likewise")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments)
    if arguments.json:
        from support import extension  # before ktlib is imported

        from ktlib.files import ownership

        ownership.refuse_foreign([arguments.json], "--json", arguments.json)

    began, begun, kinds, failures = time.monotonic(), 0, collections.Counter(), []
    selector = selectors.DefaultSelector()

    def start(first):
        if first < arguments.seed + arguments.calls:
            job = Job(first, began + arguments.seconds)
            selector.register(job.process.stdout, selectors.EVENT_READ, job)

    def finish(job, what):
        selector.unregister(job.process.stdout)
        job.process.wait()
        if what:
            failures.append({"seed": job.current, "what": what})
            print(failures[-1], file=sys.stderr)
            start(job.current + arguments.jobs if job.current is not None else arguments.seed + arguments.calls)

    def hear(job, word, rest):
        nonlocal begun
        if word == "begin":
            job.current, begun = int(rest), begun + 1
            return
        found = json.loads(rest)
        kinds[found.get("kind", "failed")] += 1
        if "what" in found:
            failures.append({"seed": job.current} | found)
            print(failures[-1], file=sys.stderr)
        if kinds.total() % 5000 == 0:
            print(kinds.total(), "calls,", len(failures), "failures", flush=True)

    for first in range(arguments.seed, arguments.seed + min(arguments.jobs, arguments.calls)):
        start(first)
    while selector.get_map():
        for key, _ in selector.select(timeout=1):
            lines = key.data.lines()
            for line in lines or ():
                hear(key.data, *line.split(" ", 1))
            if lines is None:
                code = key.data.process.wait()
                reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                finish(key.data, f"crash: {reason}" if code else None)
        for key in list(selector.get_map().values()):
            patience = arguments.patience * (20 if key.data.current is None else 1)  # imports take longer
            if time.monotonic() - key.data.heard > patience:
                key.data.process.kill()
                finish(key.data, "hang")

    import torch
    from support import (
        extension,  # noqa: F401
        fuzz,
    )

    result = {
        "command": f"python tests/fuzz_long.py --calls {arguments.calls} --seed {arguments.seed}",
        "date": datetime.date.today().isoformat(),
        "processor": fuzz.ktlib.cpu_info()["model"],
        "isas": fuzz.ISAS,
        "torch": torch.__version__,
        "calls": begun,
        "seconds": round(time.monotonic() - began),
        "kinds": dict(sorted(kinds.items())),
        "failures": failures,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        ownership.write_text(arguments.json, text + "\n", "--json", replace=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
