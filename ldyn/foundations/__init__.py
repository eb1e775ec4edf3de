"""Foundations: the exact calculus on which everything else in the book rests.

One module a chapter: `jacobians`, `softmax`, `kl`. Import the one you need, for instance
``from ldyn.foundations.softmax import softmax_jacobian``.
"""
