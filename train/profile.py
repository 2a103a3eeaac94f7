"""A trace of chosen steps (--profile FIRST:LAST), and the parts that took longest."""

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from configs.checks import UserError, require

FOLDER = "profile"
SHOWN = 15


@dataclass
class Profile:
    """Steps to trace; none by default."""

    first: int = 0
    last: int = 0
    is_on: bool = False

    @property
    def is_asked(self) -> bool:
        return self.first > 0

    def before(self, step: int, run_dir: Path) -> None:
        """To be called before each step, counted from 1."""
        if step == self.first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the host's Python would be most of the trace
            jax.profiler.start_trace(str(run_dir / FOLDER), profiler_options=options)
            self.is_on = True

    def after(self, step: int, state: Any, run_dir: Path) -> None:
        """To be called after each step; waits for the last one, and says what took longest."""
        if self.is_on and step == self.last:
            jax.block_until_ready(state)
            self.close()
            seconds = longest_parts(run_dir / FOLDER)
            count = self.last - self.first + 1
            print(f"\ntrace of steps {self.first} to {self.last} in {run_dir / FOLDER}; longest:")
            for name, spent in seconds.most_common(SHOWN):
                print(f"  {1e3 * spent / count:9.2f} ms a step  {name}")

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self.is_on:
            jax.profiler.stop_trace()
            self.is_on = False


def parse_profile(text: str | None) -> Profile:
    """ "FIRST:LAST" or "STEP"; None traces nothing.

    Raises:
      UserError: no such steps.
    """
    if text is None:
        return Profile()
    first, _, last = text.partition(":")
    try:
        steps = int(first), int(last or first)
    except ValueError:
        steps = (0, 0)
    if not 1 <= steps[0] <= steps[1]:
        raise UserError(f"--profile {text} must be FIRST:LAST, two steps from 1 on, as 5:7")
    return Profile(*steps)


def longest_parts(folder: Path) -> Counter[str]:
    """Seconds by the name of what the devices did, over all of their threads."""
    paths = sorted(folder.rglob("*.trace.json.gz"))
    require(bool(paths), f"{folder} holds no trace")
    with gzip.open(paths[-1]) as file:
        events = json.load(file)["traceEvents"]
    names = {x["pid"]: x["args"]["name"] for x in events if x.get("name") == "process_name"}
    threads = {
        (x["pid"], x["tid"]): x["args"]["name"] for x in events if x.get("name") == "thread_name"
    }
    seconds: Counter[str] = Counter()
    for event in events:
        if event.get("ph") != "X":
            continue
        process = names.get(event["pid"], "")
        thread = threads.get((event["pid"], event["tid"]), "")
        is_device = "/device:" in process and "XLA Ops" in thread
        is_part = "::" not in event["name"] and not event["name"].startswith("[")
        if is_device or ("XLA" in thread and is_part):
            seconds[event["name"]] += event["dur"] / 1e6
    return seconds
