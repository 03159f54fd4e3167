"""Experiments: data sets, models, training runs, evaluation, the paper's tables. Needs the extra ``train``.

The library (``densreg``) never imports this package.
"""
