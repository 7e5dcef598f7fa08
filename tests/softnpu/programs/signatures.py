"""What softnpu says of its operators' C signatures: a JSON object by name.
`signatures.py NAME...`
"""

import ctypes
import json
import sys

import torch  # noqa: F401  (libopapi is linked against it)

from softnpu import library_folder

library = ctypes.CDLL(str(library_folder() / "libopapi.so"))
library.softnpu_signature.restype = ctypes.c_char_p
answers = {name: library.softnpu_signature(name.encode()) for name in sys.argv[1:]}
print(json.dumps({name: answer and answer.decode() for name, answer in answers.items()}))
