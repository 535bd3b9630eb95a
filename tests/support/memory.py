"""What a piece of code takes of memory of its own, measured in a process of its own.

``RssAnon`` counts what only this process has: heap and stacks. Pages of mapped files, which can be dropped and shared,
are not in it.
"""

import json
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import json, re, sys, threading, time
sys.path.insert(0, {tests!r})

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

{setup}
start = peak = anonymous()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    result = (lambda: {expression})()
finally:
    done.set()
    watcher.join()
print("MEASURED", json.dumps({{"peak": peak - start, "end": anonymous() - start}}))
"""


def measure(setup, expression):
    """``{"peak", "end"}``: bytes of anonymous memory that ``expression`` adds, at most and when it is done."""
    script = _SCRIPT.format(setup=setup, expression=expression, tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("MEASURED")[2])
