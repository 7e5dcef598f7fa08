"""The shipped small model: corpus, training through the references' autograd, release in official form."""
