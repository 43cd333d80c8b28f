"""What a user may set: configuration, the model registry, the embedded model's files and the error tree.

Imports the standard library and yaml only; it knows nothing of requests, tensors or servers.
"""
