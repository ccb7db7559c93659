"""`python stub_train.py train ...`: what a run leaves behind and how it takes signals, without learning anything.

$STUB_FAILS names runs ("*/ppo/seed-0") that die in their second iteration; an iteration takes $STUB_SECONDS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from archer_fast.cli_args import parse_train
from archer_fast.run_folder import RunFolder, write_json

stopping = False


def stop(number: int, frame: object) -> None:
    global stopping
    if stopping:
        sys.exit(130)
    stopping = True


def main() -> None:
    assert sys.argv[1] == "train"
    signal.signal(signal.SIGINT, stop)
    config = parse_train(sys.argv[2:], prog="stub train")
    folder = RunFolder(config.out)
    folder.save_config(config)
    done = len(folder.metrics.read_text().splitlines()) if folder.metrics.exists() else 0
    print("goes on after" if config.resume else "starts from", done)
    value = 0.0
    with folder.metrics.open("a") as log:
        for i in range(done + 1, config.iterations + 1):
            if stopping:
                print("saved")
                sys.exit(130)
            if i == 2 and Path(config.out).match(os.environ.get("STUB_FAILS", "nobody")):
                sys.exit("RuntimeError: out of luck")
            time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
            value = -10 + i + config.seed / 10 - (config.algorithm == "ppo")
            row = {"iteration": i, "games": i * config.rollout.games, "return": value, "seconds_critic": 1.0}
            log.write(json.dumps(row) + "\n")
            log.flush()
    write_json(folder.summary, {"before_return": -10.0, "last_return": value, "best_return": value})


main()
