"""What every notebook starts from: the repo on Python's path, the default model, and one running example.

The example is that of `python generate.py`: a page of the Python reference into which a note with the code
of a padlock was slipped, and the question for that code. Import it before anything else of this repo.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from generate import QUESTION, built_in_text, checkpoint_folder, encode, load_tokenizer
from model import Llama

os.chdir(Path(__file__).parents[1])  # pictures and results are found from there
FAST = bool(os.environ.get("GVOTE_FAST"))  # for CI: fewer texts and repeats, the same cells
torch.set_grad_enabled(False)
model = Llama.from_pretrained(checkpoint_folder())
tokenizer = load_tokenizer(checkpoint_folder())
prompt = encode(tokenizer, f"{built_in_text(tokenizer)}\n\n{QUESTION}")  # (1, T)
words = [tokenizer.decode([token]) for token in prompt[0].tolist()]
