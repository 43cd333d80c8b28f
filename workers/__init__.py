"""All that touches a tensor: layers, models, attention, K/V cache, sampler, the worker process.

It is told what to compute, step by step, and knows nothing of requests, scheduling or HTTP.
"""
