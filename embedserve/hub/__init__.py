"""Encoders that others export to ONNX already, written as our bundles: `embedserve pull REPO`.

    hub or folder ─ fetching ─► Repository ─ layouts ─► Foreign ─ graft ─► graphs of our contract ┐
                                                           └──── proof: their vectors against ours ┴─► bundle

A layout knows one way of laying out a repository. Everything after it knows none. Nothing here needs torch;
`onnx` and `huggingface_hub` come with the extra `hub`.
"""
