"""Calls the operators of a library that was built outside of softnpu's tree."""

import torch
from aclnn import AclnnError, vendor
from dense_check import empty

from softnpu import current

library = vendor()
print(library.signature("aclnnClamped"), "|", library.signature("aclnnTwice"))
assert library.signature("aclnnRmsNorm") is None, "it answers for CANN's own operators"
x, y, twice = torch.tensor([-3.0, 0.5, 2.0]).npu(), empty(3), empty(3)
library.call("aclnnClamped", x=x, limit=1.0, y=y)
library.call("aclnnTwice", x, twice)
print(y.cpu().tolist(), twice.cpu().tolist())
for words, wrong in (("'limit'", dict(limit=0.0)), ("'x'", dict(x=x.int()))):
    try:
        library.call("aclnnClamped", **dict(x=x, limit=1.0, y=y) | wrong)
        raise SystemExit(f"wrong {words} was accepted")
    except AclnnError as error:
        assert words in str(error) and error.code == 161002, error
print("launched", current().launches()["aclnnClamped"])
