"""The command of generate.py with all methods of this repo: GVote and PeakVotes, and their rivals in
baselines.py.

python notebooks/compare.py --policy full gvote h2o:0.5 kvzip:0.25 ideas.py:newest_half
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C shows no traceback, also while torch is being imported
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes temporary folders
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import generate
from baselines import METHODS

if __name__ == "__main__":
    generate.POLICIES.update(METHODS)
    generate.command()
