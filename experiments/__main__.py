"""python -m experiments: measure what is missing, then draw and write everything.

Every cell (an experiment, a model, a seed) is kept as soon as it is there, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from experiments.results import EXPERIMENTS
from experiments.running import run, write
from experiments.setting import FULL, QUICK
from reap.errors import ReapError

HERE = Path(__file__).resolve().parent


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--out", type=Path, default=HERE, help="results, figures, RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(given)
    for name in options.names:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name!r}: choose of {', '.join(EXPERIMENTS)}")
    if options.quick and options.out == HERE:
        parser.error("--quick needs an --out of its own: it would replace the results")
    try:
        if not options.draw:
            names = options.names or list(EXPERIMENTS)
            setting = QUICK if options.quick else FULL
            run(names, setting, options.out, jobs=options.jobs, fresh=options.fresh)
        write(options.out)
    except ReapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
