"""The shipped small model: its corpus, its training through the references' autograd, and its release in official form."""
