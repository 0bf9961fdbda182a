"""Checkpoints: which tensor goes where, both formats, conversion, comparison. Nothing is imported here, so that
`mapping` stays free of torch.
"""
