"""The shipped small model: corpus, training through the references' autograd,
release in official form.
"""

import dsv4_backend  # noqa: F401  (first: decides how torch itself is imported)
