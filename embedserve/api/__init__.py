"""The HTTP API: one module per resource, its request and response models beside it.

A handler parses, calls the towers, a collection or the classifier, and renders. Everything that can go
wrong is an error of `embedserve.errors` or `indexes.base`; `embedserve.api.failures` gives it its status.
"""
